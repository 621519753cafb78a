"""The study's verdicts, tables and pictures, made of its rows."""

import numpy as np
import scipy.stats
from matplotlib.figure import Figure

from experiments import common
from experiments.study.study import ARMS, PRIMARY, SECONDARY, Claim, flops, make_stages

AGREEMENT = {"": Claim("CM", "agreement alone", below=False)}  # beside the claims, without Holm
MEASURES = {"FD Few": 1, "FD overall": 1, "recall Few": 3, "accuracy Few": 3, "memorised Few": 3,
            "FD2 Few": 1}  # and how many digits of them are shown


def at(rows, setting, arm, guidance=0.0, network="θ"):
    """The rows of an arm, by seed; nan where all of them ran off."""
    here = ((rows["setting"] == setting) & (rows["arm"] == arm) & (rows["network"] == network)
            & (rows["guidance"] == guidance))
    columns = rows.columns.union([*MEASURES, "loss Few", "above fuse"])
    return rows[here].reindex(columns=columns).set_index("seed")


def paired(rows, claim):
    """(ours, theirs) of a claim, the seeds that both have."""
    pair = [at(rows, claim.setting, arm, claim.guidance) for arm in (claim.ours, claim.theirs)]
    seeds = pair[0].index.intersection(pair[1].index)
    return [run.loc[seeds] for run in pair]


def of_planned(run, setting, names, guidance, network="θ"):
    """How many seeds there are of how many there will be, of all the arms `names`."""
    planned = min(max((len(stage.seeds) for stage in make_stages().values()
                       if stage.setting == setting
                       and (network, guidance) in stage.points.get(arm, ())), default=0)
                  for arm in names)
    return f"{len(run)} of {planned}" if len(run) else "not run"


def same_within(differences, margin):
    """p of two one-sided t-tests (TOST) that the mean difference is outside (-margin, margin)."""
    return max(scipy.stats.ttest_1samp(differences, -margin, alternative="greater").pvalue,
               scipy.stats.ttest_1samp(differences, margin, alternative="less").pvalue)


def verdict(claim, differences, p, margin):
    """Of a claim. p: adjusted; margin: within which two arms count as the same."""
    if len(differences) < 2:
        return "open (one seed)" if len(differences) else "not run"
    if not np.isfinite(differences).all():
        return "open (a run ran off)"
    lower = differences.mean() < 0
    if p < 0.05 and claim.below:
        return "holds" if lower else "the reverse holds"
    if p < 0.05:
        return f"differs: {claim.ours} {'below' if lower else 'above'}"
    if claim.below or not margin > 0:
        return "open"
    same = same_within(differences, margin)
    return f"{'the same' if same < 0.05 else 'open'} (within ±{margin:.1f}: p = {same:.3f})"


def difference_cells(claim, pair):
    """A comparison's cells: the paired differences, mean and 95 % interval."""
    cells = {name: common.interval(*common.difference(*(run[name] for run in pair))[:2], digits)
             for name, digits in MEASURES.items()}
    return {"ours − theirs": f"{claim.ours} − {claim.theirs}", "setting": claim.setting,
            "guidance": f"{claim.guidance:g}", "seeds": of_planned(
                pair[0], claim.setting, (claim.ours, claim.theirs), claim.guidance)} | cells


def verdicts(rows):
    """[{column: text}], a row a claim, and CM against agreement alone."""
    shown, (ours, theirs) = [], paired(rows, PRIMARY[1])
    margin = (theirs["FD Few"] - ours["FD Few"]).mean() / 4  # a quarter of (1)'s gain
    for family in (PRIMARY, AGREEMENT, SECONDARY):
        pairs = [paired(rows, claim) for claim in family.values()]
        p_values = [scipy.stats.ttest_rel(ours["FD Few"], theirs["FD Few"]).pvalue
                    if len(ours) > 1 else np.nan for ours, theirs in pairs]
        for (number, claim), pair, p, adjusted in zip(
                family.items(), pairs, p_values, common.holm(p_values), strict=True):
            ours, theirs = (run["FD Few"] for run in pair)
            shown.append({"claim": f"{number}"} | difference_cells(claim, pair) | {
                "p": "–" if np.isnan(p) else f"{p:.3f}",
                "p, Holm": "–" if np.isnan(p) or not number else f"{adjusted:.3f}",
                "verdict": verdict(claim, ours - theirs, adjusted, margin)})
    return shown


def guided_differences(rows):
    """[{column: text}]: the claims' comparisons at guidance 1.5."""
    claims = [claim._replace(guidance=1.5) for family in (PRIMARY, AGREEMENT, SECONDARY)
              for claim in family.values()]
    pairs = [(claim, paired(rows, claim)) for claim in dict.fromkeys(claims)]
    return [difference_cells(claim, pair) for claim, pair in pairs if len(pair[0])]


def name_of(arm, run):
    """An arm's name in tables: the authors have no fuse, so it is said where ours acts."""
    acts = run["above fuse"].mean() > 0.01
    return f"{arm}, with our fuse" if acts and "--div-margin inf" not in ARMS[arm].flags else arm


def arms(rows, guidance):
    """[{column: text}]: all arms at a guidance, mean ± standard deviation over seeds; * where no
    other guidance has a lower FD on Few."""
    shown = []
    points = ((stage.setting, arm, *point) for stage in make_stages().values()
              for arm, of_arm in stage.points.items() for point in of_arm)
    for setting, arm, network, w in dict.fromkeys(points):
        run = at(rows, setting, arm, w, network)
        if w != guidance:
            continue
        others = rows[(rows["setting"] == setting) & (rows["arm"] == arm)
                      & (rows["network"] == network)].groupby("guidance")["FD Few"].mean()
        best = "*" if len(others) > 1 and run["FD Few"].mean() == others.min() else ""
        cost = flops(setting, arm) / flops(setting, "DDPM")
        shown.append({
            "setting": setting, "arm": name_of(arm, run) + ", θ_g" * (network == "θ_g"),
            "FLOPs": f"{cost:.2f}", "seeds": of_planned(run, setting, [arm], w, network)} | {
            name: common.spread(run[name], digits) + (best if name == "FD Few" else "")
            for name, digits in (MEASURES | {"loss Few": 4}).items()})
    return shown


def fuse(rows):
    """[{column: text}]: d on Few without dropout; the share above the fuse of the samples with
    w < 0, in the whole training and, for a split, in each tenth of it; means over seeds."""
    shown = []
    for (setting, arm), _ in rows.groupby(["setting", "arm"], sort=False):
        run = at(rows, setting, arm)
        if run["above fuse"].notna().any():
            row = {"setting": setting, "arm": arm, "d Few": f"{run['d Few'].mean():.1e}",
                   "above fuse, %": f"{100 * run['above fuse'].mean():.2f}"}
            for split in ("Medium", "Few"):
                tenths = [cell.split() for cell in run[f"above fuse {split}"] if cell]
                row[f"{split}, %, by tenth"] = " ".join(
                    f"{100 * share:.1f}" for share in np.mean(np.array(tenths, float), 0))
            shown.append(row)
    return shown


def everything(rows):
    """All tables in Markdown."""
    parts = {"Claims: paired by seed [95 %], Holm over 1 to 4 and over 5 to 10": verdicts(rows),
             "The same at guidance 1.5": guided_differences(rows)}
    parts |= {f"All arms, guidance {w:g}": arms(rows, w) for w in (0.0, 1.5, 0.5, 1.0, 3.0)}
    parts["The fuse"] = fuse(rows)
    return "\n\n".join(f"{title}\n\n{common.markdown(part)}" for title, part in parts.items())


def draw(rows, assets):
    """study_arms.png, all arms of `large`; study_settings.png, large against small."""
    panels = {"arms": (list(ARMS), [("large", 0.0), ("large", 1.5)]),
              "settings": (list(make_stages()["small"].points),
                           [(setting, w) for w in (0.0, 1.5) for setting in ("large", "small")])}
    for name, (shown, of_picture) in panels.items():
        shown = [arm for arm in shown if len(at(rows, "large", arm))]
        size = 1.5 + 3.2 * len(of_picture), 1 + 0.24 * len(shown)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(of_picture), sharey=True)
        for axis, (setting, guidance) in zip(axes, of_picture, strict=True):
            for place, arm in enumerate(shown):
                fd = at(rows, setting, arm, guidance)["FD Few"]
                axis.scatter(fd, place + np.linspace(-0.2, 0.2, len(fd)), s=12)
                axis.plot([fd.mean()] * 2, [place - 0.35, place + 0.35], color="k", lw=1)
            axis.set(title=f"{setting}, guidance {guidance:g}", xlabel="FD on Few")
            axis.grid(alpha=0.3)
        axes[0].set_yticks(range(len(shown)), [name_of(a, at(rows, "large", a)) for a in shown])
        axes[0].invert_yaxis()
        common.save(figure, assets / f"study_{name}.png")
