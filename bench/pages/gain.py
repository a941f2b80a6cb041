"""The README's table: time and memory of the loss on one GPU, and of other ways to compute it."""

from ..errors import UserError
from .markdown import milliseconds, size, table

DEVICE = "nvidia-h100-80gb-hbm3"
MODEL, PART = "mistral-nemo", 0.3
ROWS = {  # provider -> what the README calls it
    "reference": "PyTorch, written by hand: shift, `.float()`, `F.cross_entropy`",
    "megatron-fused": "Megatron, fused cross-entropy",
    "reference-compiled": "`torch.compile` of the code written by hand",
    "liger": "Liger, cross-entropy",
    "flash-attn-inplace": "flash-attention, Triton kernel, in place",
    "ours-cuda-inplace": "**ours**, `inplace_backward=True`",
    "ours-cuda-oneread-inplace": "**ours**, and `grad_in_forward=True` (one read)",
}
HEAD = ("", "ms, all scored", f"ms, {PART:.0%} scored", "memory beyond the logits")
OURS = "ours-cuda-inplace"
AGAINST = {"reference": "written by hand", "megatron-fused": "Megatron", "liger": "Liger"}


def blocks(measured):
    """Records of other devices leave the README as it is."""
    return {"gain": gain(measured[DEVICE])} if DEVICE in measured else {}


def gain(one):
    """The sentence and the table for the record `one`."""
    case, full = _at(one, 1.0)
    _, part = _at(one, PART)
    lines = [
        _line(label, full[name], part[name])
        for name, label in ROWS.items()
        if _is_measured(full, name) and _is_measured(part, name)
    ]
    return f"{_sentence(full, part)}\n\n{table(HEAD, lines, left=1)}\n\n{_what(one, case)}"


def _is_measured(rows, name):
    """Whether a provider was installed, and its time and memory were measured."""
    return name in rows and bool(rows[name]["ms"] and rows[name]["memory"])


def _at(one, scored):
    """(the case of MODEL with this scored fraction, {provider: its row})."""
    wanted = (MODEL, 1, scored)
    for index, case in enumerate(one["cases"]):
        if (case["model"], case["tp"], case["scored"]) == wanted:
            return case, {row["provider"]: row for row in one["rows"] if row["case"] == index}
    raise UserError(
        f"expected a case of {wanted} in the record of {one['machine']['device']}, got none; "
        "measure it: python -m bench gpu --only kernels-1"
    )


def _line(label, full, part):
    return [label, milliseconds(full), milliseconds(part), size(full["memory"]["full"])]


def _sentence(full, part):
    if not (_is_measured(full, OURS) and _is_measured(part, OURS)):
        raise UserError(f"expected {OURS} to be measured for the README, got no time or no memory")
    peers = {name: title for name, title in AGAINST.items() if _is_measured(full, name)}
    times = " / ".join(f"{full[name]['ms']['p50']:.1f}" for name in peers)
    ours = full[OURS]["ms"]["p50"], part[OURS]["ms"]["p50"]
    share = ours[1] / ours[0]
    less = "about half of that" if 0.4 <= share <= 0.6 else f"{share:.0%} of that"
    return (
        f"**{ours[0]:.2f} ms against {times} ({' / '.join(peers.values())}) on an H100, no "
        f"extra memory, and {less} when {PART:.0%} of the tokens are scored.**"
    )


def _what(one, case):
    machine = one["machine"]
    return (
        f"Loss and gradient of {case['rows']} tokens and a vocabulary of {case['columns']}: bf16 "
        f"logits of {size(case['logits_bytes'])}. Measured on {machine['device']} with torch "
        f"{machine['versions']['torch']}, {machine['date'][:10]}; medians."
    )
