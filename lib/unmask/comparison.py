"""Detectors side by side on the same items: AUC of each, and its paired difference to one of them."""

import pandas as pd

from unmask.evaluation import join, slices_by_kind
from unmask.intervals import auc_difference, auc_interval, delong, holm, paired_p

TEXTS, COUNTS = ["dataset", "method", "detector", "variant"], ["seeds", "items"]
AUC, GAIN = ["auc", "low", "high"], ["gain", "gain_low", "gain_high", "p", "p_delong"]
TYPES = dict.fromkeys(TEXTS, str) | dict.fromkeys(COUNTS, int) | dict.fromkeys([*AUC, *GAIN], float)


def compare(
    scores: pd.DataFrame, manifest: pd.DataFrame, control: tuple[str, str], level: float = 0.95, draws: int = 1000
) -> pd.DataFrame:
    """AUC of every detector and variant, and its difference to `control`, per data set and method.

    Videos and images are judged apart (`evaluation.slices_by_kind`). scores: a score table with one frame per item
    (-1). control: (detector, variant). Columns dataset, method, detector, variant, seeds, items; auc, low, high; gain,
    gain_low, gain_high; p, p_delong, p_holm, also where nothing can be judged and no row is left. Intervals are drawn
    over groups, alike for both; seeds are averaged in every draw. p is that of `paired_p` for "no gain"; p_holm
    corrects it for all rows of the table together, every data set and method, except those of the control itself, whose
    p are NaN. p_delong is the plain DeLong test of the scores averaged over seeds, as papers report it: it is
    uncorrected and takes items for independent, so that it is too small wherever the items of a group resemble each
    other. All are judged on the items that all of them scored; where the control has no scores of a data set, gains and
    p are NaN there.
    """
    rows = []
    for where, part in slices_by_kind(join(scores, manifest)).items():
        if where.reals != "all" or part["label"].nunique() < 2:
            continue
        keys, columns = ["item_id", "label", "group_id"], ["detector", "variant", "seed"]
        wide = part.pivot(index=keys, columns=columns, values="score").dropna().sort_index(axis=1)
        labels, groups = (wide.index.get_level_values(name) for name in keys[1:])
        names = list(dict.fromkeys(column[:2] for column in wide.columns))
        other = wide[tuple(control)].to_numpy() if tuple(control) in names else None
        for name in names:
            own = wide[name].to_numpy()
            about = dict(zip(TEXTS, (where.dataset, where.method, *name), strict=True))
            about |= {"seeds": own.shape[1], "items": len(wide)}
            about |= zip(AUC, auc_interval(labels, own, groups, level, draws), strict=True)
            if other is not None:
                about |= zip(GAIN, auc_difference(labels, own, other, groups, level, draws), strict=False)
            if other is not None and name != tuple(control):
                about |= {"p": paired_p(labels, own, other, groups)}
                about |= {"p_delong": delong(labels, own.mean(axis=1), other.mean(axis=1))[1]}
            rows.append(about)
    table = pd.DataFrame(rows, columns=list(TYPES)).astype(TYPES)
    return table.assign(p_holm=holm(table["p"]))
