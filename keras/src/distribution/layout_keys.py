"""Keys of a layout map, made of paths, and the program that makes the map."""

import re


def pattern_of(path):
    """A regular expression of a path, whatever numbers it has."""
    return re.sub(r"\d+", r"\\d+", re.escape(path).replace(r"\-", "-"))


def keys_of(weights, axes):
    """Keys that match what is cut alike, and nothing else."""
    cut_of = {v.path: tuple(cut) for v, cut in zip(weights, axes)}
    alike = {}
    for path, cut in cut_of.items():
        if any(cut):
            alike.setdefault((pattern_of(path), cut), []).append(path)
    keys = {}
    for (_, cut), paths in alike.items():
        key = common_pattern(paths)
        if any(
            re.fullmatch(key, path) and other != cut
            for path, other in cut_of.items()
        ):
            key = "|".join(map(re.escape, paths))
        keys[key] = cut
    return _joined(keys)


def common_pattern(paths):
    """A regular expression of paths that differ in numbers alone."""
    split = [re.split(r"(\d+)", path) for path in paths]
    parts = []
    for place, words in enumerate(zip(*split)):
        if place % 2 and len(set(words)) > 1:
            parts.append(r"\d+")
        else:
            parts.append(re.escape(words[0]).replace(r"\-", "-"))
    return "".join(parts)


def _joined(keys):
    """Joins keys of one layout that differ in one part of the path."""
    result = {}
    for key, cut in keys.items():
        parts = key.split("/")
        for other, theirs in list(result.items()):
            others = other.split("/")
            differ = [
                i for i, (a, b) in enumerate(zip(parts, others)) if a != b
            ]
            if (
                theirs == cut
                and len(parts) == len(others)
                and len(differ) == 1
                and "|" not in key
                and (differ[0] < len(parts) - 1)
            ):
                (i,) = differ
                inside = others[i]
                if inside.startswith("(") and inside.endswith(")"):
                    inside = inside[1:-1]
                elif "|" in inside:
                    continue
                others[i] = f"({inside}|{parts[i]})"
                del result[other]
                result["/".join(others)] = cut
                break
        else:
            result[key] = cut
    return result


def code_of(keys):
    """A program that makes such a layout map."""
    lines = ["layout_map = keras.distribution.LayoutMap(mesh)"]
    for key, cut in keys.items():
        quoted = f'r"{key}"' if "\\" in key else f'"{key}"'
        names = ", ".join(f'"{n}"' if n else "None" for n in cut)
        comma = "," if len(cut) == 1 else ""
        lines.append(f"layout_map[{quoted}] = ({names}{comma})")
    return "\n".join(lines)
