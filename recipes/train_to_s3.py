"""Train into a bucket: the run is killed, and goes on on another machine, from the bucket alone, to the very same bits.

    python recipes/train_to_s3.py

The bucket is in a server on this machine, which is started here (moto, from pip: 'moto[server]'). For a real one all
that is needed is the name of the directory and credentials, as for any tool of AWS:

    AWS_PROFILE=training python recipes/full_finetune.py --output-dir s3://bucket/run --no-check
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer
from resume_after_kill import train

BUCKET = "training"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save-every", default="3 steps")
    args, options = parser.parse_known_args()
    options += ["--steps", str(args.steps), "--save-every", args.save_every]

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # the server's log of requests
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
    }
    bucket = boto3.resource("s3", region_name="us-east-1", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).Bucket(BUCKET)
    bucket.create()

    local = Path("runs/without-bucket")
    shutil.rmtree(local, ignore_errors=True)
    print(f"on the disk: {local}")
    expected = train(local, options)

    run = f"s3://{BUCKET}/run"
    arrived = rf"uploaded {run}/", "a step has arrived"
    for machine, kill_at in (("one machine", arrived), ("another one", None)):
        print(f"{machine}: {run}")
        with tempfile.TemporaryDirectory() as disk:  # where steps are put together before they are uploaded
            os.environ["TMPDIR"] = disk
            found = train(run, options, kill_at)

    print(f"\n{'in the bucket':60} {'bytes':>11}")
    for one in bucket.objects.all():
        print(f"{one.key:60} {one.size:11,}")
    for what, sum_ in expected.items():
        print(f"{what:10} {sum_[:19]}…  {found[what][:19]}…  {'same' if found[what] == sum_ else 'DIFFERENT'}")
    server.stop()
    if found != expected:
        raise SystemExit("the run in the bucket ended elsewhere")


if __name__ == "__main__":
    main()
