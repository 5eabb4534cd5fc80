"""How much of a loop's exp2 runs while matrix products are in flight, read from Hopper machine code (SASS).

In a well-scheduled attention loop the exponentials of one block run under the wgmma of the next. Neither a count of
instructions nor of registers shows when the compiler has put them one after the other: their order does.
"""

from __future__ import annotations

import re


def loops(lines: list[str]) -> list[tuple[int, int]]:
    """(first, last) line of every loop: from a label to a later branch back to it."""
    labels, found = {}, []
    for i, line in enumerate(lines):
        if m := re.match(r"\s*(\.L_x_\d+):", line):
            labels[m[1]] = i
    for i, line in enumerate(lines):
        m = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if m and labels.get(m[1], i) < i:
            found.append((labels[m[1]], i))
    return found


def events(body: list[str]) -> list[str]:
    """'H' a wgmma, 'E' an exp2, 'W' the wait for all wgmmas, in order."""
    found = []
    for line in body:
        if "HGMMA" in line:
            found.append("H")
        elif "MUFU.EX2" in line:
            found.append("E")
        elif re.search(r"DEPBAR\.LE gsb0, 0x0\b", line):
            found.append("W")
    return found


def overlap(sass: str) -> float:
    """The best share, over the innermost loops that have both, of exp2 issued while wgmmas are in flight.

    That is between a wgmma and the next wait for all of them. Products that an iteration leaves in flight count for the
    exp2 at the next one's start: forward softmax runs under the next block's scores or under the last block's values,
    as the compiler likes; backward under dP, before which S has been waited for. 1.0 where no loop has both: there is
    nothing to overlap. The best loop is the steady one; masked edges don't count.
    """
    lines = sass.splitlines()
    spans = loops(lines)
    best = None
    for first, last in spans:
        inner = [(a, b) for a, b in spans if first < a and b < last and any("HGMMA" in x for x in lines[a:b])]
        order = events(lines[first:last])
        if inner or "H" not in order or "E" not in order:
            continue
        running, under = [e for e in order if e != "E"][-1] == "H", 0
        for event in order:
            running = event == "H" or (running and event != "W")
            under += running and event == "E"
        best = max(best or 0.0, under / order.count("E"))
    return 1.0 if best is None else round(best, 3)


def overlap_by_role(sass: str) -> float:
    """`overlap` of a kernel; of the worst role where warps have roles, which change their registers as they begin."""
    return min(map(overlap, re.split(r"^.*\bUSETMAXREG\b.*$", sass, flags=re.MULTILINE)))
