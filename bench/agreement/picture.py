"""The picture of the long runs: the loss, and the distance of each bf16 run from the fp32 run."""

from ..kernels import plots
from ..sft.losses import EVERY_TITLE, IN_FP32, LINEAR, REVERSED

WINDOW = 10  # steps of a moving mean: a batch more or less hard moves all runs alike
STYLES = {
    "reference": {"color": "#404040", "lw": 2.5, "alpha": 0.7},
    REVERSED: {"color": "#9a9a9a", "lw": 2.5, "alpha": 0.7},
    "ours": {"color": "#0b3c8c", "lw": 1.2},
    LINEAR: {"color": "#c2410c", "lw": 1.2, "ls": "--"},
}


def draw(record, path):
    """Draw the record of `bench agreement` as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curve, apart) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    losses = record["losses"]
    base = losses[IN_FP32]
    steps = range(1, len(base) + 1)
    curve.plot(steps, base, color="#15803d", lw=3, alpha=0.5, label=EVERY_TITLE[IN_FP32])
    curve.plot(steps, losses["ours"], label=EVERY_TITLE["ours"], **STYLES["ours"])
    curve.set(title="loss", xlabel="step", ylabel="mean loss of the scored tokens")
    curve.legend()
    for name, style in STYLES.items():
        distances = [abs(loss - exact) for loss, exact in zip(losses[name], base, strict=True)]
        apart.plot(steps, smoothed(distances), label=f"{EVERY_TITLE[name]}, bf16", **style)
    apart.set(
        title=f"distance from the fp32 run, mean of {WINDOW} steps",
        xlabel="step",
        ylabel="difference of the loss",
        yscale="log",
    )
    apart.legend()
    plots.save(figure, record, path)


def smoothed(values):
    """The mean of each value and those before it, WINDOW at most."""
    parts = (values[max(0, at + 1 - WINDOW) : at + 1] for at in range(len(values)))
    return [sum(part) / len(part) for part in parts]
