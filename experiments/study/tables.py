"""The study's verdicts, tables and pictures, made of its rows."""

import functools

import numpy as np
import pandas as pd
import scipy.stats
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch.utils.flop_counter import FlopCounterMode

import cm
from experiments import common
from experiments.study.study import (ARMS, PRIMARY, QUESTION, SECONDARY, SETTINGS, STAGES,
                                     Claim, Run, options_of)

AGREEMENT = {"": Claim("CM", "agreement alone", below=False)}  # beside the claims
MEASURES = {"FD Few": 1, "FD overall": 1, "recall Few": 3, "accuracy Few": 3, "memorised Few": 3,
            "FD2 Few": 1}  # and how many digits of them are shown
MAIN = [*QUESTION, "RS", "CM with RS", "OC", "CM on OC"]


def at(rows, setting, arm, guidance=0.0, network="θ"):
    """The rows of an arm, by seed."""
    here = ((rows["setting"] == setting) & (rows["arm"] == arm) & (rows["network"] == network)
            & (rows["guidance"] == guidance))
    columns = rows.columns.union([*MEASURES, "loss Few", "above fuse"])  # lacking if all ran off
    return rows[here].reindex(columns=columns).set_index("seed")


def paired(rows, claim):
    """(ours, theirs) of a claim, the seeds that both have."""
    pair = [at(rows, claim.setting, arm, claim.guidance) for arm in (claim.ours, claim.theirs)]
    seeds = pair[0].index.intersection(pair[1].index)
    return [run.loc[seeds] for run in pair]


# ------------------------------------------------------------------------------------------------
# Claims


def differences(rows, claims, measures=tuple(MEASURES)):
    """[{column: text}]: of what claims compare, ours − theirs, paired by seed, mean [95 %]."""
    shown = []
    for claim in claims:
        ours, theirs = paired(rows, claim)
        planned = min(max((len(stage.seeds) for stage in STAGES.values()
                           if stage.setting == claim.setting and arm in stage.points), default=0)
                      for arm in (claim.ours, claim.theirs))
        shown.append({"ours − theirs": f"{claim.ours} − {claim.theirs}",
                      "where": f"{claim.setting}, guidance {claim.guidance:g}",
                      "seeds": f"{len(ours)} of {planned}"} | {
            name: common.difference(ours[name], theirs[name], MEASURES[name])
            for name in measures})
    return shown


def verdicts(rows, claims):
    """[{column: text}], a row a claim, on FD Few, Holm over all of `claims`."""
    first, *pairs = ([run["FD Few"] for run in paired(rows, claim)]
                     for claim in (PRIMARY[1], *claims.values()))
    margin = (first[1] - first[0]).mean() / 4  # a quarter of (1)'s gain
    p_values = common.holm([scipy.stats.ttest_rel(*pair).pvalue if len(pair[0]) > 1 else np.nan
                            for pair in pairs])
    shown = []
    for (number, claim), row, (ours, theirs), p in zip(
            claims.items(), differences(rows, claims.values(), ["FD Few"]), pairs, p_values,
            strict=True):
        shown.append({"claim": f"{number}"} | row | {
            "p": f"{p:.2g}" if len(ours) > 1 else "–",
            "verdict": verdict(claim, ours - theirs, p, margin)})
    return shown


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
    return f"{'the same' if same < 0.05 else 'open'} (within ±{margin:.1f}: p = {same:.2g})"


def same_within(differences, margin):
    """p of two one-sided t-tests (TOST) that the mean difference is outside (-margin, margin)."""
    return max(scipy.stats.ttest_1samp(differences, -margin, alternative="greater").pvalue,
               scipy.stats.ttest_1samp(differences, margin, alternative="less").pvalue)


# ------------------------------------------------------------------------------------------------
# Arms


def name_of(arm, run):
    """An arm's name in tables: the authors have no fuse, so it is said where ours acts."""
    off = int(run["FD Few"].isna().sum())
    name = f"{arm}, {off} ran off" if off else arm
    acts = run["above fuse"].mean() > 0.01 and "--div-margin inf" not in ARMS[arm].flags
    return f"{name}, with our fuse" if acts else name


def arms(rows, stage):
    """[{column: text}]: a stage's arms, mean ± standard deviation over seeds."""
    shown = []
    for point in dict.fromkeys(point for points in stage.points.values() for point in points):
        for arm in (arm for arm, points in stage.points.items() if point in points):
            run = at(rows, stage.setting, arm, point.guidance, point.network)
            shown.append({"arm": name_of(arm, run) + ", θ_g" * (point.network == "θ_g"),
                          "guidance": f"{point.guidance:g}",
                          "seeds": f"{len(run)} of {len(stage.seeds)}"} | {
                name: common.spread(run[name], digits)
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


@functools.cache
def flops(setting, arm):
    """FLOPs of one training step, forward and backward, in the setting's own network."""
    _, losses, network = ARMS[arm]
    config = cm.parse(options_of(Run(setting, arm, 0)))[0].resolved()
    counts = cm.class_counts(config.n_max, config.ir, 10)
    module = losses.from_config(network(config, 10, 1), torch.tensor(counts), config)
    x = torch.zeros(config.batch_size, 1, config.image_size, config.image_size)
    t = torch.zeros(config.batch_size, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        module(x, t, t, x, t)[0].backward()
    return counter.get_total_flops()


def everything(rows):
    """All tables in Markdown."""
    claims = [*PRIMARY.values(), *AGREEMENT.values(), *SECONDARY.values()]
    parts = {
        "Primary claims (p: Holm over 4)": verdicts(rows, PRIMARY) + verdicts(rows, AGREEMENT),
        "Secondary claims (p: Holm over 6)": verdicts(rows, SECONDARY),
        "What the claims compare": differences(rows, dict.fromkeys(
            claim._replace(guidance=w) for w in (0.0, 1.5) for claim in claims))}
    for name, stage in STAGES.items():
        parts[f"Stage {name}, in {stage.setting}"] = arms(rows, stage)
    parts["The fuse"] = fuse(rows)
    parts["FLOPs of a training step; DDPM's are 1"] = [{"arm": arm} | {
        setting: f"{flops(setting, arm) / flops(setting, 'DDPM'):.3f}" for setting in SETTINGS}
        for arm in QUESTION]
    return "\n\n".join(f"{title}\n\n{common.markdown(part)}" for title, part in parts.items())


# ------------------------------------------------------------------------------------------------
# Pictures

COLOURS = {"CM": "C3", "agreement": "C0", "capacity": "C1"}  # by an arm's first word; else grey
TITLES = {"large": "A network large for its data: 8×8 images, 200 to 2 a class",
          "small": "A network small for its data: 16×16 images, 1,000 to 10 a class"}


def draw(rows, assets):
    """study.png, FD on Few of the main arms, a panel a setting; study_arms.png, of all in large."""
    for name, arms, settings in (("study", MAIN, SETTINGS), ("study_arms", ARMS, ["large"])):
        shown = {setting: names for setting in settings
                 if (names := [arm for arm in arms if len(at(rows, setting, arm))])}
        if not shown:
            continue
        heights = [1 + 0.27 * len(names) for names in shown.values()]
        figure = Figure(figsize=(8.5, 1 + sum(heights)), layout="constrained")
        panels = figure.subplots(len(shown), squeeze=False, height_ratios=heights)[:, 0]
        for axis, (setting, names) in zip(panels, shown.items(), strict=True):
            draw_arms(axis, [at(rows, setting, arm) for arm in names], names)
            axis.set_title(TITLES[setting], loc="left", fontsize=10)
        figure.supxlabel("FD on Few, without guidance: the distance of rare classes' images from "
                         "real ones (lower is better)", fontsize=10)
        common.save(figure, assets / f"{name}.png")


def draw_arms(axis, runs, names):
    """A line an arm: a dot a seed, a bar at the mean over the seeds that all these arms have; a
    seed's dots joined; dotted, DDPM's mean."""
    fd = pd.concat([run["FD Few"] for run in runs], axis=1)  # [seed, arm]
    means = fd.dropna().mean()
    axis.plot(fd.T, range(len(names)), color="0.85", lw=0.7, zorder=1)
    for place, arm in enumerate(names):
        colour = COLOURS.get(arm.replace(",", "").split()[0], "0.35")
        mean = means.iloc[place]
        axis.scatter(fd.iloc[:, place], [place] * len(fd), 22, colour, alpha=0.7, lw=0, zorder=3)
        axis.plot([mean, mean], [place - 0.32, place + 0.32], color=colour, lw=3, zorder=4)
        if arm == "DDPM":
            axis.axvline(mean, color=colour, ls=":", lw=1)
    axis.set_yticks(range(len(names)), map(name_of, names, runs))
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)
    if fd.max(axis=None) > 5 * fd.min(axis=None):  # what runs off is far
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(LogLocator(2, subs=(1, 1.25, 1.5, 1.75)))
        axis.xaxis.set_major_formatter("{x:g}")
