"""How long to ask SLURM for: what the command line says, else what the plan says."""

from __future__ import annotations

from collections.abc import Mapping

from launch.chain import STEPS_OF, ChainJob
from pipeline.errors import RecipeError
from pipeline.recipe.schema import Recipe
from pipeline.runtime.folder import done


def planned_times(
    recipe: Recipe, jobs: list[ChainJob], gpu_tflops: float, network: float, given: Mapping[str, str]
) -> dict[str, str]:
    """Job -> sbatch --time: as given, else from the plan. Raises RecipeError for jobs whose time nobody tells."""
    times = {job.name: given.get(job.name, given.get("", "")) for job in jobs}
    from_plan = [job for job in jobs if not times[job.name] and job.name in STEPS_OF]
    if from_plan:
        times |= _from_plan(recipe, from_plan, gpu_tflops, network)
    if untold := [name for name, time in times.items() if not time]:
        flags = " ".join(f"--time {name}=HH:MM:SS" for name in untold)
        raise RecipeError(f"no plan tells how long {' and '.join(untold)} takes; add {flags}, or --time for all jobs")
    return times


def seconds(time: str) -> int:
    """A time limit as sbatch takes it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, secs = [*parts, 0, 0][:3]
    else:
        hours, minutes, secs = parts if len(parts) == 3 else [0, *parts, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs


def check_warning(times: Mapping[str, str], warning_s: int) -> None:
    """Raise RecipeError where a job would be told to end before it had done much."""
    for name, time in times.items():
        if name != "data" and seconds(time) < 2 * warning_s:  # that one alone gets no warning: job_script.options
            raise RecipeError(
                f"--time {name}={time}: expected at least twice the {warning_s} s before the limit at which the job is "
                "told to end, or it only goes back to the queue; ask for more, or lower warning_s in the site file"
            )


def _from_plan(recipe: Recipe, jobs: list[ChainJob], gpu_tflops: float, network: float) -> dict[str, str]:
    from pipeline.results.plan.machine import Machine
    from pipeline.results.plan.models import planned_model, vision_of
    from pipeline.results.plan.run import Planned
    from pipeline.results.plan.samples import Given, describe_samples

    try:
        vision = vision_of(planned_model("student", recipe.student))
        samples = describe_samples(recipe, Given(), vision.patches_per_token, vision.patch_numbers)
        plans = Planned(recipe, samples)
    except RecipeError as error:
        names = " ".join(f"--time {job.name}=HH:MM:SS" for job in jobs)
        raise RecipeError(f"the plan cannot tell the times: {error}\nAdd {names}, or --time for all jobs") from None
    times = {}
    for job in jobs:
        # Hours do not depend on the memory of a GPU; whether the step fits in it is the plan's own command.
        machine = Machine(job.gpus * job.nodes * max(1, job.tasks), 1.0, job.gpus, gpu_tflops, network=network)
        steps = [step for step in STEPS_OF[job.name] if step in plans.steps and not done(recipe.run / step)]
        times[job.name] = f"{sum(plans.plan(step, machine).time.slurm_hours for step in steps) or 1}:00:00"
    return times
