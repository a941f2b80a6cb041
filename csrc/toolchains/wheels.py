"""Builds every wheel that this machine's toolchains allow, and says what is left out and why.

    python -m csrc.toolchains.wheels --outdir build/wheels --toolchains FOLDER

`make wheel` runs it. There is one wheel for the CPU, and one for each major version of CUDA and
ROCm. If a version was found twice, the toolkit that makes more targets is taken, then the newer
one. FOLDER holds further toolkits, each in its own folder, as chroots.sh makes them.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass

from . import toolkits
from .toolkits import Missing, Toolkit
from .variables import given, named_backends, named_targets, refuse, say

#: The wheels for clusters, and how to get the toolkit of each.
SHIPPED = {
    "cuda": {
        "cu12": "install CUDA 12.8 or newer in /usr/local, or run csrc/toolchains/chroots.sh",
        "cu13": "install CUDA 13 in /usr/local, or put its nvcc on PATH",
    },
    "hip": {"rocm7": "install ROCm 7 in /opt/rocm, or run csrc/toolchains/chroots.sh"},
}


@dataclass(frozen=True)
class Wheel:
    label: str
    about: str
    variables: dict[str, str]  # of its build


def wheels(folder: str | None = None) -> list[Wheel]:
    """The wheels to build, which can be none."""
    text, named = given("FUSED_SFT_LOSS_BUILD"), named_backends()
    if named == set():
        return [Wheel("none", "no compiled module", {})]
    inside = [folder] if folder else []
    found = []
    if named is None or "cpu" in named:
        found.append(Wheel("cpu", "no toolkit", {"FUSED_SFT_LOSS_BUILD": "cpu"}))
    for backend, find, places in (
        ("cuda", toolkits.cudas, toolkits.FURTHER_CUDA),
        ("hip", toolkits.hips, toolkits.FURTHER_ROCM),
    ):
        if named is not None and backend not in named:
            say(f"_{backend} is left out: FUSED_SFT_LOSS_BUILD is {text!r}")
            continue
        try:
            best = best_of_each(list(find(toolkits.folders(places, inside))))
        except Missing as missing:
            if named is not None:
                sys.exit(f"FUSED_SFT_LOSS_BUILD={text}: {missing}")
            say(f"_{backend} is left out: {missing}")
            continue
        found += best
        for label, advice in SHIPPED[backend].items():
            if label not in {wheel.label for wheel in best}:
                say(f"+{label} is left out: no toolkit for it was found; {advice}")
    return found


def best_of_each(candidates: list[Toolkit]) -> list[Wheel]:
    """A wheel for each major version among toolkits of one backend."""
    makes = {toolkit: made_by(toolkit) for toolkit in candidates}
    able = [toolkit for toolkit in candidates if makes[toolkit]]
    if not able:
        candidates[0].targets()  # says why, and raises
    best: dict[str, Toolkit] = {}
    for toolkit in sorted(able, key=lambda one: (len(makes[one]), one.number), reverse=True):
        chosen = best.setdefault(toolkit.label, toolkit)
        if chosen.name != toolkit.name:
            reason = f"{chosen.name} makes {' '.join(makes[chosen])}, it {' '.join(makes[toolkit])}"
            say(f"{toolkit.name} is left out of +{toolkit.label}: {reason}")
    return [
        Wheel(
            toolkit.label,
            f"{toolkit.name}, for {' '.join(makes[toolkit])}",
            {"FUSED_SFT_LOSS_BUILD": f"cpu,{toolkit.backend}", **dict(toolkit.variables)},
        )
        for toolkit in sorted(best.values(), key=lambda one: one.number)
    ]


def made_by(toolkit: Toolkit) -> list[str]:
    """The targets of a toolkit's wheel. There are none if it makes none of the default ones, or
    cannot make one that a variable names."""
    variable, default = toolkits.wanted(toolkit.backend)
    named = named_targets(variable)
    refused = {target: toolkit.refusal(target) for target in named or default.split(";")}
    made = [target for target, reason in refused.items() if not reason]
    if made and (made == named or not named):
        return made
    target = next(target for target in refused if target not in made)
    names = f"{variable} names {target!r}" if named else f"it cannot make {target!r}"
    say(f"{toolkit.name} is left out: {names}: {refused[target]}")
    return []


def build(wheel: Wheel, outdir: str) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", outdir]
    subprocess.run(command, env={**os.environ, **wheel.variables}, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outdir", help="build here; without it, only say what would be built")
    parser.add_argument("--toolchains", metavar="FOLDER", help="holds further toolkits")
    arguments = parser.parse_args()
    folder = arguments.toolchains
    if folder and not os.path.isdir(folder):
        refuse("TOOLCHAINS", f"there is no folder {folder}; csrc/toolchains/chroots.sh makes one")
    planned = wheels(folder)
    for wheel in planned:
        say(f"wheel {wheel.label}: {wheel.about}")
    if not planned:
        sys.exit("there is no wheel to build: the lines above say why")
    for wheel in planned if arguments.outdir else []:
        build(wheel, arguments.outdir)


if __name__ == "__main__":
    main()
