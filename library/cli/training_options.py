"""All options of train_network.py: those of sd-scripts, in its order, and our own few."""

from __future__ import annotations

from library.cli.options import FLAG, Option, OptionGroup
from library.cli.training_data_options import DATA_OPTIONS
from library.cli.training_method_options import METHOD_OPTIONS
from library.cli.training_output_options import OUTPUT_OPTIONS

OWN_OPTIONS = (
    OptionGroup(
        "Not in sd-scripts",
        (
            Option(name="plan_only", type=FLAG, help="print the plan and stop before any model is loaded", extension=True),
            Option(
                name="on_bad_image",
                default="stop",
                choices=("stop", "skip"),
                help="what an unreadable image does: it stops the run, or it is named and skipped",
                extension=True,
            ),
        ),
    ),
)

TRAINING_OPTIONS = DATA_OPTIONS + METHOD_OPTIONS + OUTPUT_OPTIONS + OWN_OPTIONS
