"""Keys of a layout map, made of paths, and the program that makes the map."""

import re

NUMBERS = r"(?:_?\d+)+"


def pattern_of(path):
    """A regular expression of a path, whatever numbers it has."""
    return re.sub(r"\d+", r"\\d+", _escaped(path))


def without_numbers(path):
    """What paths are alike by: Keras calls the first layer of a class by its
    name alone, and numbers the others."""
    return re.sub(NUMBERS, "", path)


def keys_of(weights, axes):
    """Keys that match what is cut alike, and nothing else."""
    cut_of = {v.path: tuple(cut) for v, cut in zip(weights, axes)}
    alike = {}
    for path, cut in cut_of.items():
        if any(cut):
            alike.setdefault((without_numbers(path), cut), []).append(path)
    keys = {}
    for (_, cut), paths in alike.items():
        key = common_pattern(paths)
        if any(
            re.fullmatch(key, path) and other != cut
            for path, other in cut_of.items()
        ):
            key = common_pattern(paths, any_number=False)
        keys[key] = cut
    return _joined(keys)


def common_pattern(paths, any_number=True):
    """A regular expression of paths that differ in numbers alone.

    Args:
        paths: list of strings, equal `without_numbers`.
        any_number: bool, whether it may match other numbers than theirs.
    """
    # Where numbers stand in what is left without them.
    numbers = []
    for path in paths:
        found, taken = {}, 0
        for match in re.finditer(NUMBERS, path):
            found[match.start() - taken] = match.group()
            taken += len(match.group())
        numbers.append(found)
    places = sorted(set().union(*numbers))
    words = [[found.get(place, "") for found in numbers] for place in places]
    several = sum(len(set(tokens)) > 1 for tokens in words)
    if not any_number and several > 1:
        return "|".join(map(_escaped, paths))
    rest, parts, end = without_numbers(paths[0]), [], 0
    for place, tokens in zip(places, words):
        parts += [_escaped(rest[end:place]), _number(tokens, any_number)]
        end = place
    return "".join([*parts, _escaped(rest[end:])])


def _number(tokens, any_number):
    """A regular expression of what stands in one place: `"_3"`, `"3"`, `""`."""
    tokens = list(dict.fromkeys(tokens))
    if len(tokens) == 1:
        return tokens[0]
    if not any_number:
        return f"({'|'.join(tokens)})"
    kinds = {re.sub(r"\d+", r"\\d+", token) for token in tokens if token}
    number = kinds.pop() if len(kinds) == 1 else r"[_\d]+"
    return f"({number})?" if "" in tokens else number


def _escaped(text):
    return re.escape(text).replace(r"\-", "-")


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
