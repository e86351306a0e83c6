"""The sections of a page about one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from palcache.choices import RULE_NAMES
from palcache.configs import FitConfig, HeadConfig
from palcache.pages import charts
from palcache.pages.contrast_tables import option_text
from palcache.pages.markup import Html, element, facts, paragraph, section, table, text
from palcache.pages.page_figures import ChartBook, evaluation_cells, interval, key_figures, optional, share
from palcache.pages.run_views import RunView, Simplex
from palcache.runs.prototypes import Decision, Prototypes

SHOWN: Final = 3
"""Comparisons of a prototype that are not folded away."""
ROWS: Final = 300
"""Users in the table beside their chart."""
FORMS: Final[Mapping[str, str]] = {
    "line": "Each dot is a user, by its weight on the second prototype; dots of about the same weight stand on each other.",
    "triangle": "Each dot is a user: the nearer to a corner, the more weight that prototype has.",
    "projection": "Users on the two directions in which their weights differ most; diamonds are prototypes alone.",
}


def run_title(view: RunView) -> str:
    """Return a run's table, kind of head, number of prototypes and seed."""
    head, kind = view.config["head"], view.config["head"].get("head", "pal-b")
    named = kind.upper() if kind.startswith("pal-") else kind
    return f"{view.config['table']['name']}: {named}, k = {head['k']}, seed {view.config['fit']['seed']}"


def run_sections(view: RunView, book: ChartBook) -> Html:
    """Return everything that a page says about a run."""
    parts = [_figures(view), _results(view), _training(view, book)]
    if not view.users:
        parts.append(
            paragraph(
                "The run is from before predictions were kept beside a head: accuracy by user, calibration and margins are "
                "missing. Training it again with the same seed adds them."
            )
        )
    parts += [_users(view, book), _prototypes(view, book), _calibration(view, book), _new_users(view, book)]
    return "".join([*parts, _configuration(view)])


def _figures(view: RunView) -> Html:
    test = view.evaluations["test"]
    head = test["head"]
    rules = [
        (name, share(test[rule].accuracy["micro"].value), "accuracy")
        for rule, name in (("user_blind", "user-blind"), ("longer", "longer response"))
    ]
    micro = head.accuracy["micro"]
    return key_figures(
        [
            ("accuracy on test", share(micro.value), f"{interval(micro) or head.n}"),
            ("mean over users", share(head.accuracy["macro"].value), f"{head.users:,} users"),
            ("worst tenth", share(head.accuracy["worst_tenth"].value), "of the users"),
            ("log-loss", optional(head.log_loss), "nats"),
            ("calibration", optional(head.calibration_error), "expected error"),
            *rules,
        ]
    )


def _results(view: RunView) -> Html:
    columns = ("", "split", "accuracy", "95 % interval", "macro", "worst tenth", "log-loss", "Brier", "ECE")
    rows = [
        [RULE_NAMES.get(rule, rule), split, *evaluation_cells(found)]
        for split in ("test", "val")
        for rule, found in view.evaluations[split].items()
    ]
    note = "Intervals resample users. Ties count one half." if view.evaluations["test"]["head"].ties else (
        "Intervals resample users."
    )  # fmt: skip
    return section("Results", table(columns, rows, texts=2), lead=note)


def _training(view: RunView, book: ChartBook) -> Html:
    caption = f"The dashed line is the chosen step, {view.best_step:,}: that of the lowest validation loss."
    left = book.add("losses", charts.losses(view.history, view.best_step), "Loss", caption)
    right = book.add("validation", charts.validation(view.history, view.best_step), "Validation accuracy", caption)
    return section("Training", element("div", left + right, class_="grid"))


def _users(view: RunView, book: ChartBook) -> Html:
    parts = []
    if view.users:
        columns = ("user", "group", "comparisons", "head", "user-blind", "longer response")
        rows = [
            [row["user"], row["group"] or "-", f"{row['n']:,}", *(f"{row[rule]:.3f}" for rule in RULE_NAMES)]
            for row in view.users[:ROWS]
        ]
        caption = _some(len(view.users), view.users_total) + "The line joins a user's two accuracies."
        spec = charts.user_accuracies(view.users)
        folded = table(columns, rows, texts=2)
        parts.append(book.add("users", spec, "Accuracy of each user on test", caption, fallback=folded, wide=True))
    if view.simplex is not None:
        parts.append(_simplex(view.simplex, book))
    groups = view.evaluations["test"]["head"].groups
    if groups:
        rows = [
            [name, *(f"{found.groups[name]:.4f}" for found in view.evaluations["test"].values())] for name in groups
        ]
        of_groups = table(["group", *(RULE_NAMES.get(rule, rule) for rule in view.evaluations["test"])], rows)
        parts.append(element("div", element("h3", "Accuracy by group on test") + of_groups))
    return section("Users", element("div", "".join(parts), class_="grid")) if parts else ""


def _some(shown: int, total: int) -> str:
    return (
        f"{shown:,} of {total:,} users are shown, evenly many from the lowest to the highest. " if shown < total else ""
    )


def _simplex(found: Simplex, book: ChartBook) -> Html:
    explained = "" if found.explained is None else f" They hold {share(found.explained)} of the variance."
    caption = _some(len(found.users), found.total) + FORMS[found.form] + explained
    return book.add("simplex", charts.simplex(found), "Users among the prototypes", caption, wide=found.form == "line")


def _prototypes(view: RunView, book: ChartBook) -> Html:
    found = view.prototypes
    if found is None:
        return ""
    parts = []
    if len(found.decisions) > 1:
        spec = charts.similarity(found.agreement, "agreement", signed=False)
        caption = "Share of test comparisons on which two prototypes alone prefer the same response."
        parts.append(book.add("agreement", spec, "Agreement", caption))
        if found.cosine is not None:
            spec = charts.similarity(found.cosine, "cosine", signed=True)
            caption = "Mean cosine of two prototypes' ideal points over the same comparisons."
            parts.append(book.add("cosine", spec, "Similarity of ideal points", caption))
    grid = element("div", "".join(parts), class_="grid") if parts else ""
    return section("Prototypes", grid, _decided(found))


def _decided(found: Prototypes) -> Html:
    k = len(found.decisions)
    note = (
        "For each prototype alone, the comparisons on which its margin exceeds the mean of the others' most, "
        if k > 1
        else "The comparisons of the largest margins, "
    ) + f"of {found.examined:,} test comparisons; one per pair of responses, long texts clipped."
    columns = []
    for j, decisions in enumerate(found.decisions):
        head = element("h3", text(f"Prototype {j + 1} decides" if k > 1 else "The head decides"))
        shown = [_decision(decision) for decision in decisions]
        more = element("summary", f"{len(shown) - SHOWN} more") + "".join(shown[SHOWN:])
        folded = element("details", more) if len(shown) > SHOWN else ""
        columns.append(element("div", head + "".join(shown[:SHOWN]) + folded))
    button = element("button", "Whole texts", id="whole", type="button", aria_pressed="false")
    return paragraph(note) + button + element("div", "".join(columns), class_="prototypes")


def _decision(decision: Decision) -> Html:
    sides = element("dt", "prefers") + element("dd", text(decision.preferred))
    sides += element("dt", "to") + element("dd", text(decision.other), class_="other")
    margins = ", ".join(f"{j + 1}: {margin:+.2f}" for j, margin in enumerate(decision.margins))
    words = f"margins of prototypes {margins}" if len(decision.margins) > 1 else f"margin {decision.margins[0]:+.2f}"
    last = element("p", text(f"{words}; row {decision.row + 1:,}"), class_="margins")
    prompt = element("div", text(decision.prompt), class_="prompt")
    return element("div", prompt + element("dl", sides) + last, class_="decision")


def _calibration(view: RunView, book: ChartBook) -> Html:
    if not view.reliability:
        return ""
    rows = [[RULE_NAMES[row["rule"]], f"{row['predicted']:.3f}", f"{row['observed']:.3f}", f"{row['n']:,}"]
            for row in view.reliability]  # fmt: skip
    folded = table(("rule", "predicted", "observed", "comparisons"), rows)
    caption = "Bins of equal mass; on the dashed line predicted probabilities are observed shares."
    left = book.add("reliability", charts.reliability(view.reliability), "Reliability", caption, fallback=folded)
    caption = "The head's margins on test, towards the user's own answer: below zero the head is wrong."
    right = book.add("margins", charts.margins(view.margins), "Margins", caption) if view.margins else ""
    return section("Calibration and margins", element("div", left + right, class_="grid"))


def _new_users(view: RunView, book: ChartBook) -> Html:
    parts = []
    for i, (name, curve) in enumerate(view.curves.items()):
        rows = [
            [f"{row['shots']}", f"{row['users']:,}", f"{row['accuracy']:.4f}",
             "-" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"]
            for row in charts.curve_rows(curve)
        ]  # fmt: skip
        folded = table(("comparisons per user", "users", "accuracy", "95 % interval"), rows)
        caption = (
            f"Table {curve['table']}, {curve['users']:,} users, method {curve['method']}, {curve['draws']} draws of the "
            "support; the band is the 95 % interval over users."
        )
        spec = charts.learning_curve(curve)
        parts.append(book.add(f"curve-{i}", spec, f"New users: {name}", caption, fallback=folded))
    return section("New users", element("div", "".join(parts), class_="grid")) if parts else ""


def _configuration(view: RunView) -> Html:
    config = view.config
    head = {**HeadConfig.from_mapping(config["head"]).to_dict()}
    fit = {**FitConfig.from_mapping(config["fit"]).to_dict()}
    table_facts = {"name": config["table"]["name"], "fingerprint": config["table"]["fingerprint"],
                   **{f"split.{name}": value for name, value in config.get("split", config["table"].get("split", {})).items()},
                   "ties": config["table"].get("ties"), "unknown users": config["unknown_users"]}  # fmt: skip
    encoder: dict[str, Any] = {**config["encoder"], **{f"{role} space": of for role, of in config["spaces"].items()}}
    own = ("Head", "Training")  # None is a default there, and nothing elsewhere
    content = [
        facts(title, {name: option_text(value) for name, value in values.items() if value is not None or title in own})
        for title, values in (
            ("Head", head), ("Training", fit), ("Table", table_facts), ("Encoder", encoder),
            ("Versions", config["versions"]),
        )
    ]  # fmt: skip
    return section("Configuration and fingerprints", element("div", "".join(content), class_="facts"))
