"""How many Slurm jobs there are: the decisions alone, in virtual time, without Slurm."""

from __future__ import annotations

from worker.slurm.core import Bounds, Fleet, Job, Sight, WorkerRow


class Cluster:
    """A cluster that starts jobs when it is told to, and the launcher's decisions about it."""

    def __init__(self, **bounds: float) -> None:
        self.now_s = 1000.0
        given = {"least": 0, "most": 4, "slots": 2, "idle_s": 60.0, "lead_s": 30.0} | bounds
        self.fleet = Fleet(Bounds(**given), "tb")  # type: ignore[arg-type]
        self.jobs: dict[str, Job] = {}
        self.rows: dict[str, WorkerRow] = {}
        self.waiting = self.running = 0
        self.note = ""
        self.drained: list[str] = []
        self._ids = 100

    def look(self, seconds: float = 2.0) -> int:
        """Some time later; returns how many jobs were submitted."""
        self.now_s += seconds
        sight = Sight(
            self.now_s,
            self.waiting,
            self.running,
            tuple(self.rows.values()),
            tuple(self.jobs.values()),
        )
        plan = self.fleet.decide(sight)
        for _ in range(plan.submit):
            self._ids += 1
            self.jobs[str(self._ids)] = Job(str(self._ids), "PENDING", "Resources")
        for job in plan.cancel:
            del self.jobs[job]
        self.drained += plan.drain
        self.note = plan.note
        return plan.submit

    def start(self, job: str, ends_in_s: float | None = None, state: str = "ready") -> None:
        self.jobs[job] = Job(job, "RUNNING")
        self.rows[f"tb-{job}"] = WorkerRow(f"tb-{job}", state, 2, 0, ends_in_s)

    def end(self, job: str) -> None:
        del self.jobs[job]
        self.rows.pop(f"tb-{job}", None)


def test_nothing_waits_and_nothing_is_submitted() -> None:
    assert Cluster().look() == 0


def test_as_many_jobs_as_what_waits_needs_and_no_more_while_they_are_pending() -> None:
    cluster = Cluster()
    cluster.waiting = 5
    assert cluster.look() == 3
    assert cluster.look() == 0
    cluster.waiting = 50
    assert cluster.look() == 1, "--max"


def test_workers_that_are_not_jobs_count() -> None:
    cluster = Cluster()
    cluster.rows["desk"] = WorkerRow("desk", "ready", 4, 4)
    cluster.running, cluster.waiting = 4, 1
    assert cluster.look() == 1


def test_those_that_wait_hear_how_far_it_is() -> None:
    cluster = Cluster()
    cluster.waiting = 1
    cluster.look()
    assert cluster.note == "starting: a job was submitted"
    cluster.look()
    assert cluster.note == "starting: job 101 pending (Resources)"
    cluster.jobs["101"] = Job("101", "RUNNING")
    cluster.look()
    assert cluster.note == "starting: job 101 runs, its worker is starting"
    cluster.start("101", state="loading")
    cluster.look()
    assert cluster.note == "starting: job 101 runs, its worker is loading"
    cluster.start("101")
    cluster.look()
    assert cluster.note == ""


def test_jobs_that_have_not_begun_are_cancelled_when_nothing_waits_any_more() -> None:
    cluster = Cluster()
    cluster.waiting = 4
    cluster.look()
    cluster.waiting = 0
    cluster.look()
    assert cluster.jobs == {}
    cluster.waiting = 1
    assert cluster.look() == 1, "a cancelled job is not a failure"


def test_a_worker_ends_after_it_was_idle_for_a_while_but_for_those_kept_always() -> None:
    cluster = Cluster(least=1)
    cluster.waiting = 4
    cluster.look()
    for job in list(cluster.jobs):
        cluster.start(job)
    cluster.waiting = 0
    cluster.look()
    cluster.look(58.0)
    assert cluster.drained == []
    cluster.look(4.0)
    assert len(cluster.drained) == 1
    cluster.look()
    assert len(cluster.drained) == 1


def test_a_job_that_ends_soon_gets_a_successor_where_there_is_work() -> None:
    cluster = Cluster()
    cluster.waiting = 1
    cluster.look()
    cluster.start("101", ends_in_s=100.0)
    cluster.waiting, cluster.running = 0, 1
    assert cluster.look() == 0
    cluster.start("101", ends_in_s=25.0)
    assert cluster.look() == 1
    assert cluster.look() == 0
    cluster.running = 0
    cluster.end("101")
    cluster.look()
    assert cluster.jobs == {}, "nobody needs it any more"


def test_jobs_that_end_before_their_workers_come_are_not_submitted_again_at_once() -> None:
    cluster = Cluster(most=1)
    cluster.waiting = 1
    waits = []
    for _ in range(3):
        since_s = cluster.now_s
        while not cluster.look():
            assert cluster.now_s - since_s < 1000
        waits.append(cluster.now_s - since_s)
        (job,) = cluster.jobs
        cluster.jobs[job] = Job(job, "RUNNING")
        cluster.look()
        cluster.end(job)
        cluster.look()
        assert "jobs end before their workers come" in cluster.note
    assert waits[1] > 25 and waits[2] > 1.5 * waits[1]
