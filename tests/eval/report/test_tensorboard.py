"""What TensorBoard's own plugins read from a run's folder."""

import json
import shutil
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.get_experiment import Handler as GetExperiment
from tensorboard.plugins.hparams.list_session_groups import Handler as ListSessionGroups
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
from werkzeug.test import Client
from werkzeug.wrappers import Response

from gradmix.eval.features.mapped import map_arrays
from gradmix.eval.report import tensorboard
from gradmix.eval.report.tensorboard import write_projector, write_tensorboard
from gradmix.ssl.data.open_set import load_data
from gradmix.ssl.runs.folder import read_config


@pytest.fixture
def plugins(digits_run):
    """The context that TensorBoard gives its plugins, with the run's folder as --logdir."""
    runs = plugin_event_multiplexer.EventMultiplexer(tensor_size_guidance={"scalars": 0})
    runs.AddRunsFromDirectory(str(digits_run)).Reload()
    provider = data_provider.MultiplexerDataProvider(runs, str(digits_run))
    return TBContext(logdir=str(digits_run), multiplexer=runs, data_provider=provider)


def test_the_hyperparameters_tab(plugins, digits_run):
    context, request = Context(plugins), RequestContext()
    about = GetExperiment(request, context, "", api_pb2.GetExperimentRequest()).run()
    asked = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=10,
        allowed_statuses=[api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING],
    )
    for metric in about.metric_infos:
        asked.col_params.add(metric=metric.name)
    (group,) = ListSessionGroups(request, context, "", asked).run().session_groups
    assert group.hparams["epochs"].number_value == 2
    assert group.hparams["encoder.width"].number_value == 4
    assert group.hparams["mix.name"].string_value == "gradmix"
    assert group.hparams["data.augment.crop"].string_value == "[0.6, 1.0]"
    numbers = json.loads((digits_run / "metrics.json").read_text())
    shown = {value.name.tag: value.value for value in group.metric_values}
    assert {"knn/top1", "linear/top1", "osr/deep_knn/auroc", "osr/pixels/auroc", "osr/deep_knn/oscr"} <= set(shown)
    for tag, value in shown.items():
        assert value == pytest.approx(numbers[tag], abs=1e-6)


def test_the_projector(plugins, digits_run):
    routes = ProjectorPlugin(plugins).get_plugin_apps()

    def get(route, **query):
        return Client(routes[route], Response).get(route, query_string=query)

    assert get("/runs").json == ["tensorboard"]
    (embedding,) = get("/info", run="tensorboard").json["embeddings"]
    which = {"run": "tensorboard", "name": embedding["tensorName"]}
    features = np.frombuffer(get("/tensor", **which, num_rows=10_000).data, np.float32)
    saved = load_file(digits_run / "features/test.safetensors")  # fewer test images than the limit, in order
    assert np.allclose(features.reshape(embedding["tensorShape"]), saved["features"], rtol=1e-4, atol=1e-6)
    head, *lines = get("/metadata", **which, num_rows=10_000).text.splitlines()
    classes = json.loads((digits_run / "detector/scorer.json").read_text())["classes"]
    assert head == "class\ttest image" and len(lines) == len(saved["labels"])
    assert [line.split("\t")[0] for line in lines] == [[*classes, "unknown"][label] for label in saved["labels"]]
    side, _ = embedding["sprite"]["singleImageDim"]
    sprite = np.asarray(Image.open(BytesIO(get("/sprite_image", **which).data)))
    images = load_data(read_config(digits_run).data, 0).test.images.permute(0, 2, 3, 1).numpy()
    columns = sprite.shape[1] // side
    for row in (0, columns, len(lines) - 1):
        top, left = row // columns * side, row % columns * side
        assert np.array_equal(sprite[top : top + side, left : left + side], images[row])


def test_images_without_classes_are_not_called_unknown(digits_run, tmp_path):
    data = load_data(read_config(digits_run).data, 0)
    labels = torch.full_like(data.test.labels, -1)
    flat = replace(data, classes=[], test=replace(data.test, labels=labels))
    saved = load_file(digits_run / "features/test.safetensors")
    save_file(saved | {"labels": labels.numpy()}, tmp_path / "test.safetensors")
    write_projector(tmp_path / "tensorboard", tmp_path / "test.safetensors", flat)
    lines = (tmp_path / "tensorboard/projector/metadata.tsv").read_text().splitlines()
    assert {line.split("\t")[0] for line in lines[1:]} == {"image"}


def test_again_replaces_what_was_there_and_points_are_bounded(digits_run, tmp_path, monkeypatch):
    run = shutil.copytree(digits_run, tmp_path / "run")
    config, numbers = read_config(run), json.loads((run / "metrics.json").read_text())
    monkeypatch.setattr(tensorboard, "POINTS", 50)
    read = []

    def mapped(path):
        about, arrays = map_arrays(path)
        read.append(arrays)
        return about, arrays

    monkeypatch.setattr(tensorboard, "map_arrays", mapped)
    write_tensorboard(run, config, numbers | {"knn/top1": 0.125}, load_data(config.data, config.seed))
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("knn/top1")] == [0.125]
    assert len(events.Scalars("train/loss")) > 1  # training's own are still there
    assert len((run / "tensorboard/projector/metadata.tsv").read_text().splitlines()) == 51
    assert isinstance(read[0]["features"], np.memmap)  # the other rows stay on disk
