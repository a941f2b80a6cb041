"""The picture of a run: losses, times and peak memory."""

from .losses import TITLES

MIB = 2**20
STYLES = {
    "reference": {"lw": 5, "alpha": 0.4, "color": "#404040"},
    "ours": {"lw": 1.5, "color": "#0b3c8c"},
    "linear": {"lw": 1.5, "ls": "--", "color": "#c2410c"},
}


def draw(record, path):
    """Draw the record of a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curve, clock, memory) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    steps = range(1, len(record["tokens_per_step"]) + 1)
    for name, style in STYLES.items():
        if name in record["losses"]:
            curve.plot(steps, record["losses"][name], label=TITLES[name], **style)
    curve.set(title="loss", xlabel="step", ylabel="mean loss of the scored tokens")
    curve.legend()
    runs = record["runs"]
    times = [run["head_ms"] for run in runs.values()]
    _bars(clock, runs, times, "time of output layer and loss", "ms, median", "{:.1f}")
    peaks = [run["memory_bytes"]["head_peak"] / MIB for run in runs.values()]
    unit = "MiB beyond the hidden states"
    _bars(memory, runs, peaks, "peak memory of output layer and loss", unit, "{:.1f}")
    settings = "TP {tp}, vocabulary {vocab}, sequence {seq_length}".format(**record["settings"])
    figure.suptitle(f"{settings}, {record['machine']['processor']}", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _bars(axes, names, values, title, unit, form):
    """Draw a bar for the value of each name."""
    tints = [STYLES[name]["color"] for name in names]
    drawn = axes.bar([TITLES[name] for name in names], values, width=0.6, color=tints)
    axes.bar_label(drawn, [form.format(value) for value in values], fontsize=8)
    axes.set(title=title, ylabel=unit)
    axes.margins(y=0.15)
