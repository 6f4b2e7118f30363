"""Detectors side by side on the same items: AUC of each, and its paired difference to one of them."""

import pandas as pd

from unmask.evaluation import join, slices
from unmask.intervals import auc_difference, auc_interval, holm, paired_p


def compare(
    scores: pd.DataFrame, manifest: pd.DataFrame, control: tuple[str, str], level: float = 0.95, draws: int = 1000
) -> pd.DataFrame:
    """AUC of every detector and variant, and its difference to `control`, per data set and method.

    scores: a score table with one frame per item (-1). control: (detector, variant). Columns dataset, method, detector,
    variant, seeds, items; auc, low, high; gain, gain_low, gain_high; p, p_holm. Intervals are drawn over groups, alike
    for both; seeds are averaged in every draw. p is that of `paired_p` for "no gain"; p_holm corrects it for all rows
    of the table together, every data set and method, except those of the control itself, whose p are NaN. All are
    judged on the items that all of them scored.
    """
    rows = []
    for where, part in slices(join(scores, manifest)).items():
        if where.reals != "all" or part["label"].nunique() < 2:
            continue
        keys, columns = ["item_id", "label", "group_id"], ["detector", "variant", "seed"]
        wide = part.pivot(index=keys, columns=columns, values="score").dropna().sort_index(axis=1)
        labels, groups = (wide.index.get_level_values(name) for name in keys[1:])
        other = wide[control].to_numpy()
        for detector, variant in dict.fromkeys(column[:2] for column in wide.columns):
            own = wide[detector, variant].to_numpy()
            auc = auc_interval(labels, own, groups, level, draws)
            gain = auc_difference(labels, own, other, groups, level, draws)
            numbers = dict(zip(("auc", "low", "high", "gain", "gain_low", "gain_high"), auc + gain, strict=True))
            about = {"dataset": where.dataset, "method": where.method, "detector": detector, "variant": variant}
            p = float("nan") if (detector, variant) == tuple(control) else paired_p(labels, own, other, groups)
            rows.append(about | {"seeds": own.shape[1], "items": len(wide)} | numbers | {"p": p})
    table = pd.DataFrame(rows)
    return table if table.empty else table.assign(p_holm=holm(table["p"]))
