"""Models that stages load: `Model` names one in the cache, `ModelSource` loads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from peft import PeftModel
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lisa_lightning.config.settings import Lora, ModelSettings
from lisa_lightning.model.alignment_delta import Delta, alignment_factors, dense_deltas, low_rank_deltas
from lisa_lightning.model.factors import Factors, modules, trainable
from lisa_lightning.model.full import load_trainable
from lisa_lightning.model.lora import attach, attach_saved, load, save_merged
from lisa_lightning.model.merge import merge_files
from lisa_lightning.model.sharding import shard, shard_merged
from lisa_lightning.runtime.errors import UserError


@dataclass(frozen=True)
class Model:
    """A model, and optionally an adapter on it. A fully fine-tuned model has none."""

    folder: Path
    adapter: Path | None = None
    """The folder of the adapter."""

    @property
    def name(self) -> list[str]:
        """Names of the model's and the adapter's folder, which are hashes of their inputs; "" without an adapter."""
        return [self.folder.name, self.adapter.parent.name if self.adapter else ""]


@final
@dataclass(frozen=True)
class ModelSource:
    """Loads the models of a run in its data type, attention and quantization."""

    base: Model
    settings: ModelSettings
    aligned_folder: Path | None = None
    """Folder of an aligned model that the user supplies, which has no alignment adapter."""
    mesh: DeviceMesh | None = None
    """Devices among which models that all ranks run are sharded; None for whole models."""

    def load(self, model: Model, quantize: bool = False) -> PreTrainedModel:
        """Load a whole model without its adapter.

        Args:
            model: the model.
            quantize: whether to apply `model.quantize`, for training and generation. Repairs need the
                unquantized weights.
        """
        bits = self.settings.quantize if quantize else None
        return load(model.folder, self.settings.dtype, self.settings.attention, bits)

    def merge(self, model: Model) -> Any:
        """Load a whole model for generation, with its adapter merged unless the weights are quantized."""
        net: Any = self.load(model, quantize=True)
        if model.adapter is not None:
            net = PeftModel.from_pretrained(net, model.adapter)
            net = net.merge_and_unload() if self.settings.quantize is None else net
        return net

    def serve(self, model: Model, device: torch.device) -> Any:
        """Load a model for generation on this rank's device, in shards if there is a mesh.

        Args:
            model: the model.
            device: its device.
        """
        if self.mesh is None:
            return self.merge(model).to(device)
        net: Any = self.load(model)
        if model.adapter is not None:
            net = PeftModel.from_pretrained(net, model.adapter)
        return shard_merged(net, self.mesh).to(device)

    def attach(self, model: Model, lora: Lora, key: str, seed: int) -> PeftModel:
        """Load a model with the adapter to train.

        Args:
            model: the model. If it has an adapter, that is trained further.
            lora: settings of a fresh adapter.
            key: config section of `lora`, for errors.
            seed: seed of a fresh adapter's weights.
        """
        base = self.load(model, quantize=True)
        if self.mesh is not None:
            shard(base, self.mesh)
        if model.adapter:
            return attach_saved(base, model.adapter)
        return attach(base, lora, seed, key)

    def unfreeze(self, model: Model) -> PreTrainedModel:
        """Load a model without an adapter, to train all its weights."""
        return load_trainable(model.folder, self.settings.attention)

    def save_merged(self, net: PeftModel, adapter: Path, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
        """Save the base model with an adapter merged, and the tokenizer.

        Args:
            net: the base model with the adapter. Its frozen weights may be quantized or in shards.
            adapter: folder of the adapter.
            tokenizer: the tokenizer.
            out: folder to write.
        """
        if merge_files(net, self.base.folder, self.settings.dtype, out):
            tokenizer.save_pretrained(out)
        else:
            save_merged(attach_saved(self.load(self.base), adapter), tokenizer, out)

    def deltas(self, aligned: Model) -> dict[str, Delta]:
        """Return the alignment update of each module.

        Raises:
            UserError: if stage `align` did not run, or fine-tuning continues its adapter.
        """
        return low_rank_deltas(self._alignment_adapter(aligned))

    def deltas_under(self, net: PeftModel, aligned: Model) -> dict[str, Delta]:
        """Return the alignment update of each module of a finished adapter.

        Args:
            net: the aligned model with the adapter.
            aligned: the same aligned model.

        Raises:
            UserError: as in `deltas`; or the user supplies an aligned model of another shape.
        """
        if self.aligned_folder is None:
            return self.deltas(aligned)
        return dense_deltas(net, self.load(self.base), modules(trainable(net)))

    def alignment(self, aligned: Model, scaling: float) -> Factors:
        """Return the factors of the alignment adapter, whose alpha/r becomes `scaling`.

        Args:
            aligned: the aligned model.
            scaling: alpha/r of the adapter that the factors will be used with. B is multiplied to fit it.

        Raises:
            UserError: as in `deltas`.
        """
        return alignment_factors(self._alignment_adapter(aligned), scaling)

    def _alignment_adapter(self, aligned: Model) -> Path:
        if aligned.folder == self.base.folder:
            raise UserError(
                "The alignment update is unknown: stage align did not run, or model.adapters=continued. "
                "Fix: add align to stages (not align=none) and set model.adapters=stacked"
            )
        return aligned.folder / "adapter"
