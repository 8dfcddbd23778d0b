"""The lists of tasks. What they compute is held against PyTorch in test_miner.py."""

import pytest

from minegan_fast.ops._miner_passes import planned
from minegan_fast.ops._miner_program import NOTHING, Shape

SHAPE = Shape(2, 3, True, (4, 5, 6), "tanh", "affine", True, (7,), ((0.5, 0.25, 1.5),), 0)


@pytest.mark.parametrize(
    "plan",
    [
        planned("forward", (SHAPE,), True),
        planned("backward", (SHAPE,), (True,) * 7 + (False,) * 2, (True,), True),
        planned("second", (SHAPE,), (True,) * 7 + (False,) * 2, (True,), (True,) * 7 + (False,) * 2, (True,)),
    ],
    ids=["forward", "backward", "second"],
)
def test_no_task_reads_what_its_own_step_writes(plan):
    """Programs of a step run beside each other: what two tasks of one step write is different, and read by none."""
    for step in {task.step for task in plan.program.tasks}:
        tasks = [task for task in plan.program.tasks if task.step == step]
        written = [rows for t in tasks for rows in (t.out, t.raw, t.copy) if rows.tensor != NOTHING]
        read = [rows for t in tasks for rows in (t.h, t.p, t.q, *(a for a, _ in t.adds))]
        read += [rows for t in tasks for term in t.terms for rows in (term.matrix, term.source)]
        places = [(rows.tensor, rows.offset) for rows in written]
        assert len(places) == len(set(places))
        assert not {(rows.tensor, rows.offset) for rows in read} & set(places)
