"""What other tools call a key: words that people type, and the key that does it here."""

from gradmix.ssl.keys import key_of, keys_of

# The key, or the keys, each with the words for it; a command looks among those that it has.
WORDS = {
    "optimizer.base_lr": "lr learning_rate base_lr",
    "optimizer.weight_decay": "wd weight_decay",
    "optimizer.warmup_epochs": "warmup warmup_epochs",
    "probe.base_lr": "lr learning_rate base_lr",
    "probe.epochs": "epochs epoch",
    "encoder.name": "model arch architecture backbone net network",
    "encoder.init": "pretrained weights init ckpt checkpoint",
    "encoder.width": "width",
    "encoder.head_dim": "dim feat_dim proj_dim projection_dim out_dim",
    "checkpoint": "pretrained weights init ckpt",
    "trainer.logger": "wandb use_wandb mlflow tensorboard csv log logger",
    "trainer.devices": "gpus gpu ngpus n_gpus num_gpus devices",
    "trainer.accelerator": "device accelerator cuda cpu",
    "trainer.precision": "precision amp fp16 bf16 half mixed_precision",
    "trainer.accumulate_grad_batches": "grad_accum accumulate accumulate_grad_batches gradient_accumulation_steps",
    "trainer.gradient_clip_val": "clip grad_clip clip_grad clip_grad_norm",
    "batch_size": "bs batch batchsize",
    "epochs": "epoch num_epochs n_epochs max_epochs",
    "seed": "random_seed manual_seed random_state",
    "data.name": "dataset data_name",
    "data.root": "root path folder dir data_dir data_path data_root dataset_path",
    "data.image_size": "imgsz img_size image_size input_size size resolution crop_size",
    "data.workers": "workers num_workers n_workers",
    "data.known": "known known_classes classes",
    "data.split": "split fold",
    "data.augment": "aug augment augmentation augmentations transforms",
    "method.name": "loss algorithm algo ssl",
    "method.temperature": "temperature temp tau",
    "mix.name": "mixer mixup cutmix",
    "mix.options.alpha": "alpha",
    "knn_k": "k knn n_neighbors",
    "knn_temperature": "temperature temp tau",
    "detectors": "detector ood",
    "run_dir": "out output output_dir out_dir save_dir log_dir logdir exp_dir resume run name exp_name run_name",
    "out": "output output_dir out_dir save_dir run_dir",
    "run": "run_dir dir path folder name",
    "speed.compile": "compile torch_compile",
    "checkpoint_seconds": "save_every save_freq",
    "detector": "run run_dir model checkpoint weights ckpt",
    "class_name": "class name label category",
    "images": "image img input source data root path folder dir",
}


def key_for(word: str, schema: type) -> str | None:
    """How a command does what ``word`` does elsewhere; of ``optimizer.lr``, ``lr`` counts. None for other words."""
    last = word.lstrip("+~-").lower().replace("-", "_").rpartition(".")[2]
    for name, words in WORDS.items():
        if last in words.split() and (told := _how(name, schema)):
            return told
    return None


def _how(name: str, schema: type) -> str | None:
    """What to type for a key, or a group of them; None where the command has no such key."""
    if any(one.startswith(f"{name}.") for one in keys_of(schema)):
        return f"the keys {name}.* do it, --help lists them"
    try:
        about = key_of(schema, name)
    except KeyError:
        return None
    if name.endswith(".name"):
        return f"{name.removesuffix('.name')}=NAME does it, --help lists the names"
    return f"{name}={'|'.join(about.choices) or 'VALUE'} does it" + (f": {about.meaning}" if about.meaning else "")
