"""Tables of the measures for the terminal, and the goals that they reach or miss."""

import math
from typing import Dict, Iterator, List, Tuple

from .rows import SETTING, TOTALS, Row

# The norm layers of ResNet-50 at 224 x 224: how many of which channels and side.
RESNET50_LAYERS = {
    (64, 112): 1,
    (64, 56): 6,
    (256, 56): 4,
    (128, 56): 1,
    (128, 28): 7,
    (512, 28): 5,
    (256, 28): 1,
    (256, 14): 11,
    (1024, 14): 7,
    (512, 14): 1,
    (512, 7): 5,
    (2048, 7): 4,
}


def table(rows: List[Row]) -> str:
    """The rows of one setting, a line a norm, times in milliseconds."""
    whats = list(dict.fromkeys(row['what'] for row in rows))
    total = next((what for what in whats if what in TOTALS), whats[-1])
    whats.sort(key=lambda what: what == total)  # the total last
    lines = [
        '\n' + ' '.join(filter(None, (rows[0][key] for key in SETTING))),
        f'{"ms":13}' + ''.join(f'{what:>10}' for what in whats) + f'{"p10 - p90":>20}'
        f'{"x bn":>9}{"x literal":>11}{"saved x bn":>12}{"peak MiB":>10}{"launches":>10}',
    ]
    for norm in dict.fromkeys(row['norm'] for row in rows):
        by_what = {row['what']: row for row in rows if row['norm'] == norm}
        row = by_what[total]
        spread = f'{float(row["p10_ms"]):.4g} - {float(row["p90_ms"]):.4g}'
        line = f'{norm:13}' + ''.join(f'{float(by_what[w]["median_ms"]):10.4g}' for w in whats)
        line += f'{spread:>20}{_short(row["ratio_bn"], 2):>9}{_short(row["ratio_literal"], 2):>11}'
        peak = str(int(row['peak_bytes']) >> 20) if row['peak_bytes'] else '-'
        line += f'{_short(row["saved_ratio_bn"], 4):>12}{peak:>10}{row["launches"] or "-":>10}'
        missed = [goal for goal, value, limit in _limits(row) if value > limit]
        lines.append(line + ''.join(f'  MISSED: {goal}' for goal in missed))
    return '\n'.join(lines)


def _short(number: str, digits: int) -> str:
    return f'{float(number):.{digits}f}' if number else '-'


def _limits(row: Row) -> Iterator[Tuple[str, float, float]]:
    """The goals that a row has to meet by itself: name, value and limit."""
    if row['norm'] != 'ubn' or row['what'] not in TOTALS:
        return
    on_cuda = row['device'].startswith('cuda')
    if row['saved_ratio_bn']:
        what, limit = ('graph', 1.05) if row['model'] else ('layer', 1.03)
        yield f'bytes kept for backward by a {what}, x bn', float(row['saved_ratio_bn']), limit
    if row['ratio_bn'] and not row['model']:
        yield _layer_goal(row, on_cuda)
    if row['ratio_literal'] and not row['model']:
        limit = 1 / 3 if on_cuda else 0.85
        yield 'time of a layer, x literal', float(row['ratio_literal']), limit
    if row['ratio_bn'] and on_cuda and row['model'] == 'resnet50' and row['dtype'] == 'bfloat16':
        yield 'time of a ResNet-50 step, x bn', float(row['ratio_bn']), 1.1
    if row['ratio_bn'] and not on_cuda and row['model'] in _CPU_STEPS:
        goal = f'time of a {row["model"]} step, x bn'
        yield goal, float(row['ratio_bn']), _CPU_STEPS[row['model']]


# On the CPU in float32, times BatchNorm's.
_CPU_STEPS = {'resnet50': 1.03, 'resnet18_small': 1.08}
_CPU_LAYER = 'time of a float32 layer, x bn'


def _layer_goal(row: Row, on_cuda: bool) -> Tuple[str, float, float]:
    """Times BatchNorm's: by what a layer of that size is made of."""
    ratio = float(row['ratio_bn'])
    if on_cuda:
        return 'time of a layer, x bn', ratio, 1.3
    batch, channels, height, width = map(int, row['shape'].split(','))
    if batch * channels * height * width < 1 << 14:
        return 'time of a layer of overhead alone, x bn', ratio, 3.0
    if height * width <= 16:
        return 'time of a layer of small planes, x bn', ratio, 1.5
    if row['dtype'] != 'float32':
        return f'time of a layer in {row["dtype"]}, x bn', ratio, 1.5
    if row['layout'] == 'channels_last':
        return 'time of a layer in channels_last, x bn', ratio, 1.2
    return _CPU_LAYER, ratio, 1.15


def goals(rows: List[Row]) -> List[str]:
    """A line for each goal that the rows can tell about: reached or missed, and by how much."""
    limits: Dict[str, List[Tuple[float, float]]] = {}
    for row in rows:
        for goal, value, limit in _limits(row):
            limits.setdefault(goal, []).append((value, limit))
    lines = []
    for goal, pairs in limits.items():
        worst, limit = max(pairs)
        met = sum(value <= limit for value, limit in pairs)
        lines.append(_verdict(f'{goal}, worst of {len(pairs)} ({met} reach it)', worst, limit))
    layers = [value for value, _ in limits.get(_CPU_LAYER, ())]
    if layers:
        mean = sum(layers) / len(layers)
        lines.append(_verdict(f'{_CPU_LAYER}, mean of {len(layers)}', mean, 0.95))
    cpu = [
        math.log(float(row['ratio_literal']))
        for row in rows
        if row['norm'] == 'ubn' and row['what'] == 'both' and row['ratio_literal']
        if row['device'].startswith('cpu')
    ]
    if cpu:
        mean = math.exp(sum(cpu) / len(cpu))
        lines.append(_verdict(f'time of a layer, x literal, mean of {len(cpu)}', mean, 0.6))
    similarity: Dict[Tuple[str, str], List[float]] = {}
    for row in rows:
        if row['what'] == 'similarity' and row['norm'] == 'ubn':
            alike = similarity.setdefault((row['dtype'], row['layout']), [])
            alike.append(float(row['median_ms']))
    if similarity:
        spread = max(max(times) / min(times) for times in similarity.values())
        lines.append(_verdict('time of the similarity, slowest N by fastest', spread, 2))
    return lines


def _verdict(goal: str, value: float, limit: float) -> str:
    return f'{"reached" if value <= limit else "MISSED":8} {value:7.4f} <= {limit:.4g}  {goal}'


def resnet50_totals(rows: List[Row]) -> List[str]:
    """All norm layers of a ResNet-50 together, where all their shapes were measured."""
    settings: Dict[Tuple[str, str, str], Dict[Tuple[int, int], Row]] = {}
    for row in rows:
        if row['what'] == 'both':
            batch, channels, height, _ = map(int, row['shape'].split(','))
            if batch == 256:
                key = row['dtype'], row['layout'], row['norm']
                settings.setdefault(key, {})[channels, height] = row
    totals = {
        key: sum(n * float(found[at]['median_ms']) for at, n in RESNET50_LAYERS.items())
        for key, found in settings.items()
        if found.keys() >= RESNET50_LAYERS.keys()
    }
    lines = []
    for (dtype, layout, norm), total in totals.items():
        bn = totals.get((dtype, layout, 'bn'))
        ratio = f', {total / bn:.3f} x bn' if bn else ''
        lines.append(f'53 norm layers of ResNet-50, {dtype} {layout} {norm}: {total:.4g} ms{ratio}')
    return lines
