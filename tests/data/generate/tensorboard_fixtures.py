"""Writes the records of an event file with the messages and the writer of TensorBoard.

    pip install tensorboard
    python tensorboard_fixtures.py OUT

The file is described in ../README.md.
"""
import argparse
import io

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

PNG = bytes(range(256)) * 2  # Not a picture: the writer does not look into it.


def summary(*values):
    return Summary(value=values)


def scalar(tag, value):
    return Summary.Value(tag=tag, simple_value=value)


def image(tag, height, width, colorspace):
    picture = Summary.Image(height=height, width=width, colorspace=colorspace, encoded_image_string=PNG)
    return Summary.Value(tag=tag, image=picture)


EVENTS = [
    Event(wall_time=1700000000.25, file_version="brain.Event:2"),
    Event(wall_time=1700000001.5, step=501, session_log=SessionLog(status=SessionLog.START)),
    Event(wall_time=1700000002.0, step=0, summary=summary(scalar("train/loss", 0.0))),
    Event(
        wall_time=1700000003.125,
        step=1_000_000,
        summary=summary(
            scalar("train/loss", 0.1), scalar("train/lr", -1e-4), scalar("held_out/loss_q3", float("inf"))
        ),
    ),
    Event(wall_time=1700000004.0, step=127, summary=summary(image("samples", 70, 300, 1), image("colour", 1, 128, 3))),
]

parser = argparse.ArgumentParser()
parser.add_argument("out")
written = io.BytesIO()
writer = RecordWriter(written)
for event in EVENTS:
    writer.write(event.SerializeToString())
with open(parser.parse_args().out, "wb") as file:
    file.write(written.getvalue())
