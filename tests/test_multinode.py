"""Ranks on several nodes: torchrun's agents end where one process ends, and whoever is lost is named by the others."""

import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import tiny_pipeline as tiny
import torch
import torch.distributed as dist
from test_train_resume import RandomBatches, bare_trainer, free_ports
from torch.distributed.launcher.api import LaunchConfig

from nanochat.checkpoint import find_checkpoint
from nanochat.common import UserError, close_runtime, init_runtime, print0, run_script
from nanochat.optim import MuonAdamW
from nanochat.roll_call import RollCall, agree_on_attempt

ROOT = Path(__file__).resolve().parent.parent
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch._dynamo", "scripts.base_train", "pytest"])  # of tests/ it would find nothing


# --- two nodes ------------------------------------------------------------------------------------


KILLED_ONCE = """
import os, pathlib, signal
from nanochat.common import run_script
from nanochat.train import Trainer
from scripts.base_train import main, parse_args

one_step = Trainer._one_step

def struck(trainer, *args):
    mark = pathlib.Path(__file__).with_suffix(".struck")
    if trainer.runtime.rank == RANK and trainer.progress.step == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return one_step(trainer, *args)

Trainer._one_step = struck
run_script(parse_args, main)
"""


@pytest.mark.slow  # six processes import torch: 15 s of CPU, with a restart ten
@pytest.mark.parametrize("killed", [None, 0, 3])
def test_two_nodes_of_two_ranks_end_where_one_process_does(tmp_path, monkeypatch, killed):
    """Two of torchrun's agents meet on the loopback, each starts two ranks: as documented in docs/scaling.md.

    The rank `killed` dies in step 4; torchrun starts all over and they go on from the checkpoint of step 2.
    """
    # One process accumulates what four ranks take at once. Sums in another order differ in their last bit; where a
    # gradient nearly cancels, Adam makes 3e-5 of its rate of it.
    flags = ["--device-batch-size", "1", "--embedding-lr", "0.002"]
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "replaced below, restored after the test")
    tiny.prepare_base_dir(tmp_path / "nodes")
    tiny.copy_base_dir(tmp_path / "nodes", tmp_path / "alone")
    threads = torch.get_num_threads()
    tiny.train("base", tmp_path / "nodes", *flags)
    torch.set_num_threads(threads)
    tiny.forget_task()
    alone = tiny.outcome("base")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "nodes" / "artifacts"))
    port = free_ports(1)[0]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2",
              "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job",
              "--local-addr", "127.0.0.1"]
    if killed is None:
        launch += ["-m", "scripts.base_train"]
    else:
        program = tmp_path / "program.py"
        program.write_text(KILLED_ONCE.replace("RANK", str(killed)), encoding="utf-8")
        launch += ["--max-restarts", "2", str(program), "--save-every", "2", "--resume", "auto"]
    launch += ["--data", str(tmp_path / "nodes" / "texts"), *tiny.COMMON, *tiny.FLAGS["base"], *flags]
    nodes = [subprocess.Popen(launch, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}) for _ in range(2)]
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert ("resumed from" in outputs[0] + outputs[1]) == (killed is not None)
    four = tiny.outcome("base", world_size=4)
    for name, tensor in alone["tensors"][0]["model"].items():
        torch.testing.assert_close(four["tensors"][0]["model"][name], tensor, rtol=0, atol=1e-6)
        assert all(torch.equal(tensors["model"][name], four["tensors"][0]["model"][name])
                   for tensors in four["tensors"]), f"ranks disagree on {name}"
    for row, want in zip(four["rows"], alone["rows"], strict=True):
        assert row == pytest.approx(want, rel=1e-6)
    assert four["state"]["data"] == alone["state"]["data"]


# --- faults ---------------------------------------------------------------------------------------


def fail():
    raise RuntimeError("out of luck")


def mistake():
    raise UserError("the value must be another")


FAULTS = {
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "is dead or stopped"),
    "stopped": (lambda: os.kill(os.getpid(), signal.SIGSTOP), "is dead or stopped"),
    "hung": (lambda: time.sleep(300), "keeps the others waiting at test_multinode.py:"),
    "raising": (fail, "failed: RuntimeError: out of luck"),
    "mistaken": (mistake, "failed: the value must be another"),
}
POINTS = ("data", "forward", "evaluate", "save", "update")
WORLD, LOST = 3, 1
TIMEOUT_S = "4"


class FaultyBatches(RandomBatches):
    def micro_batches(self):
        batches = super().micro_batches()
        self.strike("data", self.handed_out)
        return batches


def train_until_struck(args: argparse.Namespace) -> None:
    """Train six steps, saving every second; the rank LOST meets `fault` at `point` after the save of step 2."""
    runtime = init_runtime("cpu")
    trainer = bare_trainer(args.folder / "d1")

    def strike(point: str, step: int) -> None:
        if runtime.rank == LOST and point == args.point and step >= 4:
            FAULTS[args.fault][0]()

    def before(point: str, function):
        def struck(*values, **options):
            strike(point, trainer.progress.step + 1)
            return function(*values, **options)
        return struck

    trainer.runtime = runtime
    trainer.optimizer = MuonAdamW(trainer.model, trainer.model.kernels, rank=runtime.rank, world_size=WORLD)
    trainer.optimizer.step = before("update", trainer.optimizer.step)
    trainer.forward = before("forward", trainer.model)
    trainer.save = before("save", trainer.save)
    trainer.evaluate, trainer.eval_every = before("evaluate", lambda step: {}), 1
    batches = FaultyBatches()
    batches.strike = strike
    trainer.run(batches)
    close_runtime()


def rank_main(main, rank: int, environment: dict, output: Path, args: argparse.Namespace) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      NANOCHAT_TIMEOUT=TIMEOUT_S, TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    RollCall.TICK_S, RollCall.PATIENCE_S = 0.2, 3.0
    run_script(lambda: args, main)


class Job:
    """The ranks of one job, started as torchrun's agent starts them: this process keeps the store."""

    def __init__(self, folder: Path, main, environments: list[dict], store: dist.TCPStore | None = None, **args):
        world_size = len(environments)
        folder.mkdir(parents=True)
        self.store = store or dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.outputs = [folder / f"rank{rank}.txt" for rank in range(world_size)]
        common = {"WORLD_SIZE": str(world_size), "MASTER_PORT": str(self.store.port)}
        namespace = argparse.Namespace(folder=folder, **args)
        self.ranks = [FORKSERVER.Process(target=rank_main, args=(
            main, rank, common | environments[rank], self.outputs[rank], namespace)) for rank in range(world_size)]
        for rank in self.ranks:
            rank.start()

    def ended(self, but: int | None = None) -> list[tuple[int, str]]:
        """Wait and return the exit code and the output of every rank, but for one, then end what is left."""
        for number, rank in enumerate(self.ranks):
            if number != but:
                rank.join(60)
        results = [(rank.exitcode, output.read_text(encoding="utf-8"))
                   for number, (rank, output) in enumerate(zip(self.ranks, self.outputs, strict=True)) if number != but]
        for rank in self.ranks:
            rank.kill()
            rank.join()
        return results


def check_that_the_lost_rank_is_named(tmp_path, faults_and_points) -> None:
    jobs = {(fault, point): Job(tmp_path / f"{fault}-{point}", train_until_struck, [{}] * WORLD, fault=fault,
                                point=point)
            for fault, point in faults_and_points}
    ended = {key: job.ended(but=LOST) for key, job in jobs.items()}
    for (fault, point), others in ended.items():
        for code, output in others:
            assert code == 2, (fault, point, output)
            (sentence,) = [line for line in output.splitlines() if line.startswith("error: rank ")]
            assert f"rank {LOST} on " in sentence and FAULTS[fault][1] in sentence, (fault, point, sentence)
            assert sentence.count(" on ") == 1, "nobody else is blamed"
            assert "Traceback" not in output
        saved = find_checkpoint(tmp_path / f"{fault}-{point}" / "d1")
        assert saved.name == "step_000002"


@pytest.mark.parametrize("faults_and_points", [
    [("killed", "data"), ("stopped", "forward"), ("hung", "evaluate"), ("raising", "save"), ("mistaken", "update")],
    *[pytest.param([(fault, POINTS[(i + shift) % 5]) for i, fault in enumerate(FAULTS)], marks=pytest.mark.slow)
      for shift in range(1, 5)],
])
def test_a_lost_rank_ends_the_job_by_name_and_leaves_the_checkpoint(tmp_path, faults_and_points):
    check_that_the_lost_rank_is_named(tmp_path, faults_and_points)


def _wait(error):
    raise error


def compute(error):
    raise error


@pytest.mark.parametrize(("error", "raised_by", "lost"), [
    (RuntimeError("Application timeout caused pair closure"), _wait, True),
    (RuntimeError("[../gloo/tcp/pair.cc:534] Connection closed by peer"), compute, True),
    (dist.DistNetworkError("The client socket has timed out"), compute, True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), compute, False),
    (ValueError("wrong"), _wait, False),
])
def test_an_error_of_a_collective_is_told_from_a_programs(error, raised_by, lost):
    store = dist.HashStore()
    roll_call = RollCall(store, 0, 1)
    roll_call.PATIENCE_S = 0.0
    store.wait(["alive 0"])
    try:
        raised_by(error)
    except Exception as caught:
        sentence = roll_call.explain(caught, None)
    roll_call.join()
    assert (sentence is not None) == lost
    assert not lost or str(error).rpartition("] ")[2] in sentence


# --- joining --------------------------------------------------------------------------------------


def join_only(args: argparse.Namespace) -> None:
    init_runtime("cpu")
    close_runtime()


def test_nodes_without_a_shared_base_directory_are_refused(tmp_path):
    def job(name, *folders):
        return Job(tmp_path / name, join_only, [{"NANOCHAT_BASE_DIR": str(tmp_path / folder), "LOCAL_WORLD_SIZE": "1"}
                                                for folder in folders])

    jobs = [job("shared", "a", "a"), job("apart", "a", "b")]
    shared, apart = (job.ended() for job in jobs)
    assert [code for code, _ in shared] == [0, 0] and not list((tmp_path / "a").iterdir())
    for rank, (code, output) in enumerate(apart):
        assert code == 2
        assert (f"error: rank {rank}: NANOCHAT_BASE_DIR must be one folder that all nodes share, 1 of 2 ranks do not "
                f"see what rank 0 wrote; {tmp_path}/{'ab'[rank]} on ") in output
        assert output.rstrip().endswith(("is rank 0's", "is another")[rank])


def join_and_lose_rank_1(args: argparse.Namespace) -> None:
    runtime = init_runtime("cpu")
    if runtime.rank == 1:
        FAULTS[args.fault][0]()
    runtime.all_reduce(torch.ones(1))


def test_an_attempt_reads_nothing_of_the_one_before(tmp_path):
    """torchrun keeps one store for all attempts of a job: addresses, the shared folder's marker, reasons to end."""
    nodes = [{"NANOCHAT_BASE_DIR": str(tmp_path / "base"), "LOCAL_WORLD_SIZE": "1"}] * 2
    first = Job(tmp_path / "first", join_and_lose_rank_1, nodes, fault="mistaken")
    assert [code for code, _ in first.ended()] == [2, 2]
    second = Job(tmp_path / "second", join_and_lose_rank_1, nodes, store=first.store, fault="killed")
    code, output = second.ended()[0]
    assert code == 2 and FAULTS["killed"][1] in output and "the value must be another" not in output
    third = Job(tmp_path / "third", join_only, nodes, store=first.store)
    assert third.ended() == [(0, ""), (0, "")]


def test_every_attempt_has_a_name_that_all_its_ranks_know_whatever_is_in_the_store():
    store, names = dist.HashStore(), []
    store.set("question 1", "of a rank that died before it was answered")
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            ranks = [pool.submit(agree_on_attempt, store, rank, 3, timedelta(seconds=20)) for rank in range(3)]
        (name,) = {rank.result() for rank in ranks}
        names.append(name)
    assert len(set(names)) == 3
    with pytest.raises(RuntimeError, match="ranks 1, 2 did not come"):
        agree_on_attempt(store, 0, 3, timedelta(seconds=0.1))


def refusal(monkeypatch, **environment) -> str:
    base = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_ports(1)[0]), "NANOCHAT_TIMEOUT": "1"}
    for name, value in (base | environment).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        init_runtime("cpu")
    assert not dist.is_initialized()
    return str(caught.value)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_waits_in_vain_says_where(monkeypatch, rank):
    port = str(free_ports(1)[0])
    sentence = refusal(monkeypatch, RANK=rank, LOCAL_RANK=rank, MASTER_PORT=port)
    assert sentence.startswith(f"rank {rank} of 2 on ")
    assert f"must meet the others at 127.0.0.1:{port} within 1 s, it did not (" in sentence


@pytest.mark.parametrize("seconds", ["0", "-3", "1.5", "soon", ""])
def test_a_timeout_must_be_whole_seconds(monkeypatch, seconds):
    assert refusal(monkeypatch, NANOCHAT_TIMEOUT=seconds) == (
        f"NANOCHAT_TIMEOUT must be whole seconds from 1, got {seconds!r}")


def test_variables_that_torchrun_would_have_set_are_named(monkeypatch):
    assert refusal(monkeypatch, MASTER_PORT=None, LOCAL_RANK=None) == (
        "WORLD_SIZE=2 needs torchrun's variables, LOCAL_RANK, MASTER_PORT not set")


@pytest.mark.parametrize(("environment", "sentence"), [
    ({"WORLD_SIZE": ""}, "WORLD_SIZE must be a whole number from 1, got ''"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number from 1, got '0'"),
    ({"RANK": "one"}, "RANK must be a whole number from 0, got 'one'"),
    ({"MASTER_PORT": "http"}, "rank 0 of 2 on "),
])
def test_variables_that_torchrun_would_not_have_set_so_are_refused(monkeypatch, environment, sentence):
    assert refusal(monkeypatch, **environment).startswith(sentence)


def test_a_rank_without_a_world_speaks(monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    print0("alone")
    monkeypatch.setenv("WORLD_SIZE", "2")
    print0("one of two")
    assert capsys.readouterr().out == "alone\n"


# --- the documented commands ----------------------------------------------------------------------


@pytest.fixture
def slurm_job(tmp_path):
    """The batch file of docs/scaling.md under fakes of srun and scontrol; returns (start, what they logged)."""
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").split("\nUnder Slurm")[1].split("\n\n")[1]
    file = tmp_path / "job.sh"
    file.write_text("".join(f"{line.removeprefix('    ')}\n" for line in text.splitlines()), encoding="utf-8")
    fakes = {"srun": 'trap "echo saved >>log; exit 1" TERM\necho "srun $*" >>log\n[ -n "$DONE" ] && exit\n'
                     "sleep 60 & wait",
             "scontrol": 'echo "scontrol $*" >>log'}
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)

    def start(**variables):
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[0-1]",
               "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "64", "DONE": "", **variables}
        return subprocess.Popen(["bash", "-eu", file], cwd=tmp_path, env=env, start_new_session=True)

    return start, tmp_path / "log"


def test_the_slurm_job_saves_before_its_time_is_over_and_queues_again(slurm_job):
    start, log = slurm_job
    job = start()
    while "srun" not in (log.read_text() if log.exists() else ""):
        time.sleep(0.05)
    time.sleep(0.2)  # until the job has its trap, which it sets after starting srun
    job.terminate()
    assert job.wait(30) != 0
    os.killpg(job.pid, signal.SIGKILL)  # the fake's sleep
    _, srun, *rest = log.read_text().splitlines()
    assert srun.startswith("srun --cpus-per-task=64 --kill-on-bad-exit=1 .venv/bin/python -m torch.distributed.run ")
    assert rest == ["saved", "scontrol requeue 7"]


def test_a_slurm_job_that_is_done_does_not_queue_again(slurm_job):
    start, log = slurm_job
    assert start(DONE="yes").wait(30) == 0
    assert "requeue" not in log.read_text()


def test_torchrun_reads_the_documented_timeout(monkeypatch):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "110")
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1)
    if not hasattr(config, "shutdown_timeout"):
        pytest.skip(f"torch {torch.__version__} has no such setting")
    assert config.shutdown_timeout == 110
