from __future__ import annotations

import dataclasses
import pickle
import signal
import subprocess
import sys
from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_grpo.errors import CheckpointError
from lightning_grpo.rollout.producer import pack_group, unpack_group
from lightning_grpo.rollout.records import (
    SCHEMA,
    read_rows,
    trajectory_files,
    write_groups,
)
from lightning_grpo.types import Outcome, RouterShape, Routes
from tests.fakes.ranks import ROOT
from tests.fakes.recordings import read_groups
from tests.fakes.tiny_run import make_group


def test_groups_come_back_as_they_were_written(tmp_path):
    groups = [make_group(0, (0.0, 1.0), version=3), make_group(7, (0.25,))]
    path = write_groups(tmp_path / "a" / "x.parquet", groups, step=4, version=5)
    assert read_groups(path) == [groups]


def test_what_the_policy_gave_when_it_trained_stands_beside_what_was_sampled(tmp_path):
    groups = [make_group(0, (0.0, 1.0)), make_group(7, (0.25,))]
    tokens = len(groups[1].trajectories[0].input_ids)
    scored = {2: [-0.5] * tokens}
    path = write_groups(tmp_path / "x.parquet", groups, step=1, version=1, policy_logprobs=scored)
    assert [row["policy_logprobs"] for row in read_rows(path)] == [[], [], [-0.5] * tokens]
    assert read_groups(path) == [groups]


def test_two_groups_of_the_same_prompt_stay_apart(tmp_path):
    groups = [make_group(0), make_group(0)]
    path = write_groups(tmp_path / "x.parquet", groups, step=1, version=1)
    assert read_groups(path) == [groups]


def test_files_of_a_folder_are_read_in_order_of_step(tmp_path):
    for step in (12, 3):
        path = tmp_path / "trajectories" / f"step_{step:06d}.parquet"
        write_groups(path, [make_group(step)], step=step, version=step)
    assert [row["step"] for row in read_rows(tmp_path)] == [3, 3, 12, 12]
    assert [groups[0].prompt.row for groups in read_groups(tmp_path / "trajectories")] == [3, 12]


def test_a_row_says_where_it_comes_from_and_how_it_ended(tmp_path):
    path = tmp_path / "x.parquet"
    write_groups(path, [make_group(9)], step=4, version=5, outcome=Outcome.FILTERED)
    row = read_rows(path)[1]
    assert {name: row[name] for name in ("step", "version", "row", "group", "outcome")} == {
        "step": 4,
        "version": 5,
        "row": 9,
        "group": 0,
        "outcome": "filtered",
    }
    assert dict(row["rewards"]) == {"right": 1.0, "format": 1.0}


def test_columns_that_json_does_not_know_are_kept_as_text(tmp_path):
    group = make_group(0)
    prompt = dataclasses.replace(group.prompt, columns={"day": date(2024, 2, 29)})
    path = tmp_path / "x.parquet"
    write_groups(path, [dataclasses.replace(group, prompt=prompt)], step=1, version=0)
    ((read,),) = read_groups(path)
    assert read.prompt.columns == {"day": "2024-02-29"}


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    broken = dataclasses.replace(make_group(0).trajectories[0], reward="much")
    group = dataclasses.replace(make_group(0), trajectories=(broken,))
    with pytest.raises(pa.ArrowException):
        write_groups(tmp_path / "x.parquet", [group], step=1, version=0)
    assert list(tmp_path.iterdir()) == []


KILLED_IN_A_WRITE = """
import pickle, resource, signal, sys
from pathlib import Path
from lightning_grpo.rollout.records import write_groups
groups = pickle.load(sys.stdin.buffer)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel ends a process at its limit
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
write_groups(Path(sys.argv[1]), groups, step=1, version=1)
"""


def test_what_a_run_that_was_killed_in_a_write_left_is_gone_once_it_is_written_again(tmp_path):
    path = tmp_path / "x.parquet"
    groups = pickle.dumps([make_group(0)])  # of plain data: to make it there would import torch
    command = [sys.executable, "-c", KILLED_IN_A_WRITE, path]
    killed = subprocess.run(command, input=groups, check=False, cwd=ROOT)
    assert killed.returncode == -signal.SIGXFSZ
    assert len(list(tmp_path.iterdir())) == 1
    write_groups(path, [make_group(0)], step=1, version=1)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_another_kind_is_refused(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(CheckpointError, match="does not hold trajectories of this version"):
        read_rows(tmp_path)


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "x.parquet").write_text("hello")
    with pytest.raises(CheckpointError, match="can't be read as Parquet"):
        read_rows(tmp_path / "x.parquet")


def test_a_folder_without_files_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="No trajectories at"):
        trajectory_files(tmp_path)


def test_every_column_has_a_name_of_its_own():
    assert len(set(SCHEMA.names)) == len(SCHEMA.names)


def with_routes(group, experts=8):
    shape = RouterShape(layers=2, top_k=2, experts=experts)
    routes = Routes(bytes(range(3 * shape.row_bytes)), shape)
    return dataclasses.replace(
        group, trajectories=tuple(dataclasses.replace(t, routes=routes) for t in group.trajectories)
    )


@pytest.mark.parametrize("experts", [8, 300])
def test_routes_come_back_as_they_were_written(experts, tmp_path):
    groups = [with_routes(make_group(0), experts), make_group(7)]
    path = write_groups(tmp_path / "x.parquet", groups, step=4, version=5)
    assert read_groups(path) == [groups]
    assert "routes" not in read_rows(path)[0]  # of which whoever looks at answers wants none
    assert unpack_group(pack_group(groups[0]), lambda key: groups[0].prompt) == groups[0]


def test_files_of_a_release_without_routes_are_read(tmp_path):
    path = write_groups(tmp_path / "x.parquet", [make_group(0)], step=4, version=5)
    pq.write_table(pq.read_table(path).drop_columns(["routes", "router_shape"]), path)
    assert read_groups(path) == [[make_group(0)]]
