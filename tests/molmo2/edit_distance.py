"""The edit distance from its definition, for tests of what uses a library for it."""


def edits(a: str, b: str) -> int:
    """Edit distance, from its definition."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]
