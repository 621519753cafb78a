"""The study's verdicts, tables and pictures, made of its rows."""

import numpy as np
import scipy.stats
from matplotlib.figure import Figure

from experiments import common
from experiments.study.study import ARMS, PRIMARY, SECONDARY, Claim, flops, make_stages

BESIDE = {"FD Few": 1, "FD overall": 1, "recall Few": 3, "accuracy Few": 3, "memorised Few": 3,
          "FD2 Few": 1}  # what is shown beside FD on Few, with how many digits

# ------------------------------------------------------------------------------------------------
# Comparisons, paired by seed


def at(rows, setting, arm, guidance=0.0, network="θ"):
    """The rows of an arm, by seed."""
    here = ((rows["setting"] == setting) & (rows["arm"] == arm) & (rows["network"] == network)
            & (rows["guidance"] == guidance))
    return rows[here].set_index("seed")


def paired(rows, claim):
    """(ours, theirs) of a claim, the seeds that both have."""
    ours, theirs = (at(rows, claim.setting, arm, claim.guidance)
                    for arm in (claim.ours, claim.theirs))
    seeds = ours.index.intersection(theirs.index)
    return ours.loc[seeds], theirs.loc[seeds]


def planned(setting, arm, guidance=0.0, network="θ"):
    """How many seeds of an arm there will be."""
    return max((len(stage.seeds) for stage in make_stages().values() if stage.setting == setting
                and (network, guidance) in stage.points.get(arm, ())), default=0)


def p_value(pair):
    """Of a two-sided paired t-test on FD Few; nan below two seeds, and where a run ran off."""
    ours, theirs = (run["FD Few"] for run in pair)
    return scipy.stats.ttest_rel(ours, theirs).pvalue if len(ours) > 1 else np.nan


def same_within(differences, margin):
    """p of two one-sided t-tests (TOST) that the mean difference is outside (-margin, margin)."""
    return max(scipy.stats.ttest_1samp(differences, -margin, alternative="greater").pvalue,
               scipy.stats.ttest_1samp(differences, margin, alternative="less").pvalue)


def verdict(claim, pair, p, margin):
    """Of a claim. p: adjusted; margin: within which two arms count as the same."""
    differences = pair[0]["FD Few"] - pair[1]["FD Few"]
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


def verdicts(rows):
    """[{column: text}], a row a claim; CM against agreement alone beside them, without Holm."""
    shown, first = [], paired(rows, PRIMARY[1])
    margin = (first[1]["FD Few"] - first[0]["FD Few"]).mean() / 4  # a quarter of (1)'s gain
    beside = {"": Claim("CM", "agreement alone", below=False)}
    for family in (PRIMARY, beside, SECONDARY):
        pairs = [paired(rows, claim) for claim in family.values()]
        p_values = [p_value(pair) for pair in pairs]
        for (number, claim), pair, p, adjusted in zip(
                family.items(), pairs, p_values, common.holm(p_values), strict=True):
            seeds = min(planned(claim.setting, arm, claim.guidance)
                        for arm in (claim.ours, claim.theirs))
            mean, half, n = common.difference(*(run["FD Few"] for run in pair))
            shown.append({
                "claim": f"{number}", "on FD Few": f"{claim.ours} "
                f"{'below' if claim.below else 'against'} {claim.theirs}",
                "setting": claim.setting, "guidance": f"{claim.guidance:g}",
                "seeds": f"{n} of {seeds}",
                "ours": common.spread(pair[0]["FD Few"], 1),
                "theirs": common.spread(pair[1]["FD Few"], 1),
                "difference": common.interval(mean, half, 1),
                "p": "–" if np.isnan(p) else f"{p:.3f}",
                "p, Holm": "–" if np.isnan(p) or not number else f"{adjusted:.3f}",
                "verdict": verdict(claim, pair, adjusted, margin)})
    return shown


def beside(rows, guidance):
    """[{column: text}]: of each pair that is compared, the differences of what isn't claimed."""
    shown, pairs = [], {(c.setting, c.ours, c.theirs): c for c in
                        [*PRIMARY.values(), Claim("CM", "agreement alone"), *SECONDARY.values()]}
    for claim in pairs.values():
        pair = paired(rows, claim._replace(guidance=guidance))
        if len(pair[0]):
            cells = {name: common.interval(*common.difference(*(run[name] for run in pair))[:2], n)
                     for name, n in BESIDE.items()}
            shown.append({"setting": claim.setting, "difference": f"{claim.ours} − {claim.theirs}",
                          "seeds": len(pair[0])} | cells)
    return shown


# ------------------------------------------------------------------------------------------------
# All arms


def name_of(arm, run):
    """An arm's name in tables: the authors have no fuse, so it is said where ours acts."""
    acts = "above fuse" in run and run["above fuse"].mean() > 0.01
    return f"{arm}, with our fuse" if acts and "--div-margin inf" not in ARMS[arm].flags else arm


def arms(rows, guidance):
    """[{column: text}] of all arms; what isn't run says so."""
    shown = []
    for setting, arm in dict.fromkeys((stage.setting, arm) for stage in make_stages().values()
                                      for arm in stage.points):
        run, seeds = at(rows, setting, arm, guidance), planned(setting, arm, guidance)
        cost = flops(setting, arm) / flops(setting, "DDPM")
        row = {"setting": setting, "arm": name_of(arm, run), "FLOPs": f"{cost:.2f}",
               "seeds": f"{len(run)} of {seeds}" if len(run) else "not run"}
        shown.append(row | {name: common.spread(run[name], n) if len(run) else ""
                            for name, n in (BESIDE | {"loss Few": 4}).items()})
    return shown


def fuse(rows):
    """[{column: text}]: d on Few without dropout; the fuse's share of samples with w < 0, over the
    training and, for each split, in each tenth of it, means over seeds."""
    shown = []
    for (setting, arm), _ in rows.groupby(["setting", "arm"], sort=False):
        run = at(rows, setting, arm)
        if "above fuse" in run and run["above fuse"].notna().any():
            row = {"setting": setting, "arm": arm, "d Few": f"{run['d Few'].mean():.1e}",
                   "above fuse, %": f"{100 * run['above fuse'].mean():.2f}"}
            for split in ("Medium", "Few"):
                tenths = np.array([cell.split() for cell in run[f"above fuse {split}"] if cell])
                row[f"{split}, %, by tenth"] = " ".join(
                    f"{100 * share:.1f}" for share in tenths.astype(float).mean(0))
            shown.append(row)
    return shown


def guided(rows):
    """[{column: text}]: DDPM and CM over guidance, each one's best marked, and CM's theta_g."""
    shown = []
    for arm, network in (("DDPM", "θ"), ("CM", "θ"), ("CM", "θ_g")):
        for name in ("FD Few", "FD overall"):
            runs = {w: at(rows, "large", arm, w, network) for w in (0.0, 0.5, 1.0, 1.5, 3.0)}
            best = min(runs, key=lambda w: runs[w][name].mean() if len(runs[w]) else np.inf)
            shown.append({"large": f"{arm}, {network}", "": name} | {
                f"w = {w:g}": f"{common.spread(run[name], 1)} ({len(run)})" + " ←" * (w == best)
                if len(run) else "not run" for w, run in runs.items()})
    return shown


def everything(rows):
    """All tables in Markdown."""
    parts = {"Claims: paired by seed, two-sided, Holm over 1 to 4 and over 5 to 10": verdicts(rows)}
    for w in (0.0, 1.5):
        parts[f"Differences [95 %] at guidance {w:g}"] = beside(rows, w)
    for w in (0.0, 1.5):
        parts[f"All arms at guidance {w:g}: mean ± standard deviation over seeds"] = arms(rows, w)
    parts["The fuse"] = fuse(rows)
    parts["Guidance (seeds), each one's best marked"] = guided(rows)
    return "\n\n".join(f"{title}\n\n{common.markdown(part)}" for title, part in parts.items())


# ------------------------------------------------------------------------------------------------
# Pictures: FD on Few, a dot a seed


def draw(rows, assets):
    """study_arms.png, all arms of `large`; study_settings.png, large against small."""
    few = [arm for arm in make_stages()["small"].points]
    for name, panels, shown in (
            ("arms", [("large", 0.0), ("large", 1.5)], list(ARMS)),
            ("settings", [("large", 0.0), ("small", 0.0), ("large", 1.5), ("small", 1.5)], few)):
        shown = [arm for arm in shown if len(at(rows, "large", arm))]
        figure = Figure(figsize=(1.5 + 3.2 * len(panels), 1 + 0.24 * len(shown)),
                        layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True)
        for axis, (setting, guidance) in zip(axes, panels, strict=True):
            for place, arm in enumerate(shown):
                run = at(rows, setting, arm, guidance)
                shift = np.linspace(-0.2, 0.2, len(run))
                axis.scatter(run["FD Few"], place + shift, s=12, color=f"C{place % 10}")
                axis.plot([run["FD Few"].mean()] * 2, [place - 0.35, place + 0.35], color="k", lw=1)
            axis.set(title=f"{setting}, guidance {guidance:g}", xlabel="FD on Few")
            axis.grid(alpha=0.3)
        names = [name_of(arm, at(rows, "large", arm)) for arm in shown]
        axes[0].set_yticks(range(len(shown)), names)
        axes[0].invert_yaxis()
        common.save(figure, assets / f"study_{name}.png")
