"""Layout: how one run is cut over ranks, and the rules of what is legal (the only place that knows them)."""

from typing import Literal

from pydantic import BaseModel, Field

from minka.plan.errors import UserError

AXES = ("pipeline", "replicate", "shard", "context", "tensor")  # mesh order, outermost first
AVAILABLE_AXES = ("replicate", "shard")


class Layout(BaseModel, frozen=True, extra="forbid", strict=True):
    """How many ways each axis of the work is cut; the product is the world size. `shard = 0` means all ranks left."""

    pipeline: int = Field(1, ge=1, description="stages of consecutive layers")
    replicate: int = Field(1, ge=1, description="whole copies of the model (HSDP's outer axis)")
    shard: int = Field(0, ge=0, description="FSDP ways: parameters, gradients, optimizer state; 0 = all ranks left")
    context: int = Field(1, ge=1, description="ways each sequence is split")
    tensor: int = Field(1, ge=1, description="ways each matrix product is split")
    micro_batch: int = Field(1, ge=1, description="sequences a rank takes through the model at once")
    recompute: Literal["none", "block"] = Field("none", description="which activations are recomputed in backward")
    reshard: Literal["auto", "always", "never"] = Field("auto", description="free gathered weights after forward")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="compute dtype; weights stay fp32")
    engine: Literal["fsdp"] = "fsdp"

    @property
    def world(self) -> int:
        """Ranks in all; only for a resolved layout (shard > 0)."""
        return self.pipeline * self.replicate * self.shard * self.context * self.tensor

    @property
    def data_ways(self) -> int:
        """Ranks that see different samples."""
        return self.replicate * self.shard

    def resolve(self, ranks: int) -> "Layout":
        """The layout on `ranks` ranks, with shard filled in. Raises UserError when the numbers do not fit."""
        others = self.pipeline * self.replicate * self.context * self.tensor
        shard = self.shard or max(1, ranks // others)
        layout = self.model_copy(update={"shard": shard})
        if layout.world != ranks:
            fits = [n for n in range(1, ranks + 1) if ranks % n == 0]
            raise UserError(
                f"the layout needs {layout.world} ranks ({_product(layout)}) but {ranks} were started",
                where="layout",
                why="every rank has exactly one place on the mesh",
                remedy=f"start {layout.world} ranks, or choose axes whose product divides {ranks} ({fits})",
            )
        return layout


def check_layout(layout: Layout) -> None:
    """Refuse what this version cannot run. Raises UserError naming the axis and what would work."""
    for axis in AXES:
        ways = getattr(layout, axis)
        if axis not in AVAILABLE_AXES and ways > 1:
            raise UserError(
                f"{axis}={ways} cannot be run",
                where=f"layout.{axis}",
                why="this version cuts a run along replicate and shard only",
                remedy=f"set layout.{axis}=1 and raise layout.shard or layout.replicate",
            )


def _product(layout: Layout) -> str:
    return " x ".join(f"{axis} {getattr(layout, axis)}" for axis in AXES if getattr(layout, axis) > 1) or "1"
