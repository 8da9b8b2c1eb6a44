"""Speed on a GPU beside what else is installed, in sections that can be run apart.

Every figure is GPU time (`timing`). Ours and the peers alternate and the median of the ratios is
reported, since a hot GPU lowers its clocks by up to a third.
"""

import os
import pathlib
import time
from collections.abc import Callable, Sequence

from jax_flashattn._bench import features, fp8, overhead, plain, serve
from jax_flashattn._bench.harness import Group, measure, spread, with_peers
from jax_flashattn._bench.report import Report

SECTIONS: dict[str, Callable[[], list[Group]]] = {
    "plain": plain.groups,
    "serving": serve.groups,
    "fp8": fp8.groups,
    "features": lambda: features.groups(heads=plain.HIDDEN // 128),
    "overhead": overhead.groups,
}
FAMILIES = ("sm80",)


def run(
    output: pathlib.Path | None,
    *,
    only: Sequence[str] | None = None,
    family: str | None = None,
    peers: Sequence[str] | None = None,
    limit: int | None = None,
) -> None:
    """Runs sections; prints their rows and what they sum up to.

    Args:
      output: the JSON file that rows are added to, or None (`report.Report`).
      only: names of sections, all by default.
      family: the kernels to force, which then are only compared in the plain cells. To be called
        before any other kernel of the process.
      peers: the only implementations to compare with. Cells with none of them are left out, but not
        those that compare ours alone. Rows of a run with others stay in the file.
      limit: at most so many cells of each section, to see that everything runs.

    Raises:
      ValueError: a section that isn't there, or not with this family.
    """
    report = Report(output)
    sections = SECTIONS
    if family is not None:
        sections = {"plain": lambda: plain.groups(family)}
    names = list(sections) if only is None else only
    for name in names:
        if name not in sections:
            raise ValueError(f"only must be of {', '.join(sections)} here, got {name}")
    if family is not None:
        os.environ["JFA_FORCE_FAMILY"] = family
    for name in names:
        start = time.perf_counter()
        print(f"== {name}" + ("" if family is None else f", {family}"), flush=True)
        report.begin(name, family, peers)
        groups = sections[name]()
        groups = groups if peers is None else with_peers(groups, peers)
        measure(spread(groups, limit), report)
        report.write(complete=limit is None)
        report.print_summary()
        print(f"== {name}: {time.perf_counter() - start:.0f} s", flush=True)
