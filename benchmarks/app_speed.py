"""Seconds from a click on the page of a checkpoint to its first picture, and of ten people at once.

python benchmarks/app_speed.py WORKDIR
"""

import concurrent.futures
import json
import subprocess
import sys
import time
import urllib.request

BAR = 2.0  # seconds to the first picture of the digits, once compiled


def of_page(address: str) -> tuple[int, dict]:
    """The number of Make's function, and the values of its controls by name."""
    with urllib.request.urlopen(f"{address}config") as answer:
        config = json.load(answer)
    parts = {part["id"]: part["props"] for part in config["components"]}
    make = next(n for n, part in parts.items() if part.get("elem_id") == "make")
    clicked = next(f for f in config["dependencies"] if [make, "click"] in f["targets"])
    inputs = [parts[n] for n in clicked["inputs"]]
    return clicked["id"], {part["elem_id"]: part.get("value") for part in inputs}


def click(address: str, session: str, page: tuple[int, dict], **values) -> tuple[float, float]:
    """Seconds to the first picture and to the last."""
    number, controls = page
    data = {"data": [*(controls | values).values()], "fn_index": number, "session_hash": session}
    body, kind = json.dumps(data).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}gradio_api/queue/join", body, kind)
    started, first = time.monotonic(), 0.0
    urllib.request.urlopen(request).close()
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash={session}") as stream:
        for line in stream:
            if b"data:image" in line and not first:
                first = time.monotonic() - started
            if b"process_completed" in line:
                message = json.loads(line[5:])
                assert message["success"], message
                return first, time.monotonic() - started
    raise AssertionError("the page went away")


def main(workdir: str) -> int:
    command = [sys.executable, "-m", "dico_jax.app", f"--ckpt={workdir}", "--port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().split()[0]
        page = of_page(address)
        for session in ("cold", "warm", "again"):
            first, last = click(address, session, page, seed=len(session))
            print(f"{session}: first picture {first:.2f} s (bar {BAR}), all {last:.2f} s")
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            people = [pool.submit(click, address, f"p{i}", page, seed=i) for i in range(10)]
            times = sorted(person.result()[1] for person in people)
        print("ten people at once, done after", *(f"{seconds:.1f}" for seconds in times), "s")
    finally:
        process.terminate()
        process.wait()
    return int(first > BAR)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
