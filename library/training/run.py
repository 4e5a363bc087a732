"""One training run, from options to a verified file.

options -> plan (printed) -> caches -> base model -> network -> loop -> file; each arrow goes one way.
"""

from __future__ import annotations

from library.training.assembly import build_loop, with_latents, with_texts
from library.training.options import TrainingOptions
from library.training.plan import plan_text
from library.training.planning import PlannedRun, plan_facts, plan_run, skeleton_network
from library.training.progress import clock
from library.training.saving import check_output_folder, make_writable_folder
from library.training.trainer import LoopParts, Outcome, run_loop


def run_training(options: TrainingOptions) -> int:
    """Train as the options say.

    Returns:
        The exit status: 0, or 128 + the signal that ended the run early with its work saved.

    Raises:
        UserError: what is wrong with options, files or data; before any model is loaded where that can be told.
    """
    run = plan_run(options)
    if options.debug_dataset:
        from library.dataset.report import debug_lines

        run.say("\n".join(debug_lines(run.dataset, seed=run.seed)))
        return 0
    skeleton = skeleton_network(run)
    run.say(plan_text(options, plan_facts(run, skeleton)))
    if options.plan_only:
        return 0
    check_output_folder(options.saving, sum(parameter.numel() * 4 for parameter in skeleton.parameters()))
    if options.logging.folder and run.accelerator.is_main_process:
        make_writable_folder(options.logging.folder, f"--logging_dir {options.logging.folder}")
    del skeleton
    run, latents = with_latents(run)
    parts = build_loop(run, latents, with_texts(run))
    try:
        return finish(run, parts, run_loop(parts))
    finally:
        parts.progress.close()
        parts.tracker.close()


def finish(run: PlannedRun, parts: LoopParts, outcome: Outcome) -> int:
    """Save what the loop has reached, and say where it is."""
    if parts.schedule_free:
        parts.optimizer.eval()
    if parts.accelerator.is_main_process:
        epochs = outcome.steps // parts.length.steps_per_epoch
        stopped = outcome.stopped_by is not None
        path = (parts.files.save_interrupted if stopped else parts.files.save_final)(outcome.steps, epochs)
        parts.progress.close()
        seconds = parts.progress.seconds
        pace = f"{seconds / outcome.steps:.2f} s/step, {parts.progress.waited / seconds:.0%} of it waiting for data"
        run.say(f"trained {outcome.steps} of {parts.length.steps} steps in {clock(seconds)} ({pace})")
        if news := parts.files.news_of_readers(path):
            run.say(news)
        reason = f"stopped by {outcome.stopped_by}; " if stopped else ""
        run.say(f"{reason}saved {path} (re-opened and compared: equal to what was trained)")
    parts.accelerator.wait_for_everyone()
    return outcome.exit_status
