"""`distill evaluate`: the student, before and after training, and the control beside their live teacher."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from distill.errors import UserError
from distill.evaluation.statistics import mean_and_deviation, speculative
from distill.experiment.cache import as_packed, begun_for_run
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders, make_run_folder
from distill.experiment.micro_batch import with_recorded
from distill.experiment.place import Place
from distill.experiment.precision import with_types_of_machine
from distill.experiment.search import with_found_sizes
from distill.experiment.subjects import ROUND, Subject, all_subjects, kept_vocabulary, trained_roles
from distill.experiment.teacher import Teacher, open_samples
from distill.recipes.evaluate.measurement import Measurement
from distill.recipes.evaluate.measurements import all_measurements
from distill.recipes.evaluate.results import Results
from distill.report.page import write_report
from distill.report.steadiness import unsteady
from distill.report.terminal import print_tables
from distill.system import interrupt, ledger
from distill.system.files import names_only, sole_writer
from distill.system.memory import free_memory
from distill.system.progress import say


def main(experiment: Experiment, following: tuple[str, ...] = ()) -> int:
    """Make the missing measurements, write `evaluation.json` and the report, print the tables.

    `following`: phases that run next, and that must fit too.
    """
    experiment = with_found_sizes(with_recorded(with_types_of_machine(experiment)))
    folders = Folders.of(experiment)
    make_run_folder(folders)
    begun = begun_for_run(folders)
    experiment = as_packed(experiment, begun.packing)
    teacher = Teacher(experiment, Place.of(experiment))
    samples = open_samples(experiment, teacher, begun, experiment.evaluate.max_samples)
    trained_roles(experiment, folders, samples.fingerprint)
    if not len(samples.held_out):
        raise UserError(
            f"nothing to evaluate on: no document falls into corpus.held_out, {experiment.corpus.held_out}: raise it"
        )
    vocabulary = kept_vocabulary(experiment, folders)
    subjects = all_subjects(experiment, folders, teacher, samples, vocabulary)
    measurements = all_measurements(experiment, teacher, samples, vocabulary, len(subjects))
    results = Results(folders, subjects, measurements)
    if results.is_complete:
        say("evaluation: all is measured; nothing to do")
    else:
        # Imported here, because these take seconds that an evaluation without work does not need.
        from distill.experiment.last_steps import check_evaluation, check_tokenizer
        from distill.forecast.preflight import Preflight

        check_evaluation(experiment)
        check_tokenizer(experiment, teacher.tokenizer)
        preflight = Preflight(experiment, "evaluate", following)
        with sole_writer(folders.run), preflight, ledger.phase(folders.run, "evaluate"):
            for subject in subjects:
                _measure(subject, results)
            for measurement in measurements:
                if measurement.rounds > 1:
                    _measure_in_turn(measurement, subjects, results)
    result = results.view()
    asked = replace(experiment, train=replace(experiment.train, resume=False))  # resuming changes no result
    result |= {**_derived(result), "experiment": names_only(asdict(asked))}
    results.write(result)
    print_tables(result)
    if not (folders.report.exists() and folders.report.with_suffix(".md").exists()):
        write_report(folders.run)
    say(f"evaluation: {folders.evaluation}")
    say(f"report: {folders.report}")
    return 0


def _measure(subject: Subject, results: Results) -> None:
    """Measure everything that is missing of one model and takes one round. The model is in memory for this long."""
    missing = [measurement for measurement in results.missing(subject) if measurement.rounds == 1]
    if not missing:
        return
    loaded = subject.load()
    for measurement in missing:
        interrupt.stop_if_asked()
        results.put(subject, measurement, measurement.measure(subject, loaded))
    del loaded
    free_memory()


def _measure_in_turn(measurement: Measurement, subjects: list[Subject], results: Results) -> None:
    """Measure the models that lack the measurement one after another, round by round, one in memory at a time."""
    lacking = [subject for subject in subjects if measurement in results.missing(subject)]
    entries: dict[str, list[Any]] = {subject.name: [] for subject in lacking}
    for number in range(measurement.rounds if lacking else 0):
        say(f"{measurement.section}: round {number + 1} of {measurement.rounds}")
        for subject in [each for each in lacking if measurement.takes_part(each, number)]:
            interrupt.stop_if_asked()
            entries[subject.name].append(measurement.measure(subject, subject.load()))
            free_memory()
    for subject in lacking:
        results.put(subject, measurement, measurement.join(entries[subject.name]))


def _derived(result: dict[str, Any]) -> dict[str, Any]:
    """Compute the results that follow from measurements: the speed-up as a draft model, and the spread over seeds."""
    derived: dict[str, Any] = {}
    cost = result.get("cost", {})
    if "student" in cost and "teacher" in cost and not unsteady(cost):
        speeds = [cost[name]["decode"].get("1") for name in ("teacher", "student")]
        if all(speeds):
            derived["speculative"] = speculative(result["fidelity"]["student"]["acceptance"], speeds[0] / speeds[1])
    if rounds := _rounds(result):
        derived["rounds"] = rounds
    spread = {kind: _spread(result, kind) for kind in ("student", "control")}
    if any(spread.values()):
        derived["seeds"] = {kind: values for kind, values in spread.items() if values}
    return derived


def _rounds(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each round's KL on held-out text and, if it is measured, on own texts; the last round is the student."""
    numbers = {name: int(name.split()[1]) for name in result["fidelity"] if name.startswith(f"{ROUND} ")}
    if not numbers:
        return []
    found = []
    for name, number in {**numbers, "student": max(numbers.values()) + 1}.items():
        own = result.get("own_texts", {}).get(name, {})
        own = {"own_kl": own["kl"]} if "kl" in own else {}
        found.append({"round": number, "held_out_kl": result["fidelity"][name]["kl"], **own})
    return found


def _spread(result: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return mean and deviation of each metric over the trainings of one kind, if there are several."""
    names = [name for name in result["fidelity"] if name.rpartition("/")[2] == kind]
    if len(names) < 2:
        return {}
    values: dict[str, list[float]] = {}
    for name in names:
        for metric, value in result["fidelity"][name].items():
            if isinstance(value, float):
                values.setdefault(metric, []).append(value)
        for task, found in result.get("benchmarks", {}).get(name, {}).items():
            if found["metric"] in found["metrics"]:  # else it is not finite
                values.setdefault(task, []).append(found["metrics"][found["metric"]]["value"])
    return {metric: mean_and_deviation(found) for metric, found in values.items() if len(found) == len(names)}
