"""All providers: ours for each backend and mode, PyTorch's own losses, and the peers."""

import difflib
from functools import cache, partial
from itertools import product

import torch
import torch.nn.functional as F

from fused_sft_loss import sft_loss
from fused_sft_loss.backends import selection

from ..errors import UserError
from ..reference import gather_vocabulary, reference_loss
from .peer_losses import reason_without_megatron, set_up_megatron
from .peers import PEERS
from .provider import Provider

BACKENDS = ("cpu", "cuda", "hip", "triton", "eager")
EAGER_SCRATCH = 2**27  # for tiles; it does not grow with the logits

INPLACE, ONE_READ = {"inplace_backward": True}, {"grad_in_forward": True}

#: (name, title, options of sft_loss, predicted peak). A new mode of ours is a new line.
MODES = (
    ("inplace", "in place", INPLACE, ((0, 0, 0), (0, 0, 0))),
    ("new", "new gradient", {}, ((0, 0, 0), (0, 1, 0))),
    ("oneread-inplace", "one read, in place", {**ONE_READ, **INPLACE}, ((0, 0, 0), (0, 0, 0))),
    ("oneread-new", "one read, new gradient", ONE_READ, ((0, 1, 0), (0, 1, 0))),
)


def ours(problem, backend, options):
    case = problem.case
    if "grad_in_forward" in options:  # the gradient that backward will be called with
        options = {**options, "grad_in_forward": problem.upstream}

    def loss(logits):
        return sft_loss(
            logits,
            problem.labels,
            problem.mask,
            softcap=case.softcap,
            vocab_size=case.vocab_size,
            tp_group=problem.group,
            backend=backend,
            **options,
        )

    return loss


def _reason_against_ours(backend, case, device_type):
    return selection.reason_against(backend, device_type)


def _our_providers():
    for backend, (name, title, options, predicted) in product(BACKENDS, MODES):
        if "grad_in_forward" not in options or backend in selection.ONE_READ:
            yield Provider(
                name=f"ours-{backend}-{name}",
                title=f"ours ({backend}), {title}",
                build=partial(ours, backend=backend, options=options),
                predicted=predicted,
                scratch=EAGER_SCRATCH if backend == "eager" else 0,
                reason=partial(_reason_against_ours, backend),
                writes="inplace_backward" in options,
                softcap=True,
                sharded="grad_in_forward" not in options,
                one_read="grad_in_forward" in options,
            )


def _whole(problem, logits):
    """The logits of all shards on every process, for losses that need the whole vocabulary."""
    if problem.group is None:
        return logits
    set_up_megatron(problem.source.device)
    return gather_vocabulary(logits)


def reference(problem):
    return lambda logits: reference_loss(_whole(problem, logits), problem.labels, problem.mask)


def compiled_reference(problem):
    loss, cap = _compiled_for_fixed_shapes(), problem.case.softcap
    return lambda logits: loss(_whole(problem, logits), problem.labels, problem.mask, cap)


@cache
def _compiled_for_fixed_shapes():
    """Compile the loss for each shape separately: in a training run shapes do not change."""
    torch._dynamo.config.cache_size_limit = 64  # otherwise the ninth shape would run uncompiled
    return torch.compile(_capped_reference, fullgraph=True, dynamic=False)


def _capped_reference(logits, labels, mask, cap):
    if cap:
        logits = cap * torch.tanh(logits.float() / cap)
    return reference_loss(logits, labels, mask)


def cross_entropy(problem):
    """F.cross_entropy without a cast: its log-softmax is rounded to the dtype of the logits."""

    def loss(logits):
        rows = _whole(problem, logits)
        rows = rows.view(-1, rows.size(-1))
        return problem.mean(F.cross_entropy(rows, problem.target, reduction="none").float())

    return loss


def _reason_against_gathering(case, device_type):
    return reason_without_megatron() if case.nproc > 1 else None


PROVIDERS = {
    provider.name: provider
    for provider in (
        *_our_providers(),
        Provider(
            "reference",
            "reference",
            reference,
            # Log-softmax, shifted copy, fp32 copy; then log-softmax, two fp32 gradients.
            ((4, 1, 1), (12, 0, 0)),
            reason=_reason_against_gathering,
            gathers=True,
        ),
        Provider(
            "reference-compiled",
            "torch.compile(reference)",
            compiled_reference,
            ((0, 0, 0), (0, 1, 0)),
            softcap=True,
            reason=_reason_against_gathering,
            gathers=True,
        ),
        Provider(
            "torch",
            "F.cross_entropy, no cast",
            cross_entropy,
            ((0, 1, 0), (0, 3, 0)),
            reason=_reason_against_gathering,
            gathers=True,
            precision="logits",
        ),
        *PEERS,
    )
}


def select(names, among=PROVIDERS):
    """Providers by name, or by the beginning of a name; for an empty list all providers.

    among  {name: provider}

    Raises UserError for an unknown name. The message lists the valid names.
    """
    chosen = {}
    for name in names:
        found = [p for p in among.values() if p.name == name or p.name.startswith(f"{name}-")]
        if not found:
            close = difflib.get_close_matches(name, among, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UserError(
                f"--provider: expected one of {', '.join(among)}, or how some of these begin, "
                f"got {name}{hint}"
            )
        exact = [p for p in found if p.name == name]
        chosen.update({p.name: p for p in exact or found})
    return list(chosen.values()) if names else list(among.values())
