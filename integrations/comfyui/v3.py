"""The same nodes in ComfyUI's V3 schema, made from the tables of the old one."""

from __future__ import annotations

from typing import Any

from stg_hooks.integrations.comfyui.nodes import NODES


async def comfy_entrypoint() -> Any:
    """Return the extension with all nodes; ComfyUI calls it where it does not read `NODE_CLASS_MAPPINGS`."""
    from comfy_api.latest import ComfyExtension

    class StgExtension(ComfyExtension):  # type: ignore[misc]
        async def get_node_list(self) -> list[type]:
            return [as_v3(node) for node in NODES]

    return StgExtension()


def as_v3(node: type[Any]) -> type:
    """Return a node of the V3 schema that does what a node of the old one does."""
    from comfy_api.latest import io

    fields, outputs = node.INPUT_TYPES(), getattr(node, "RETURN_NAMES", node.RETURN_TYPES)
    inputs = [
        _input(io, name, group == "optional", *given) for group in fields for name, given in fields[group].items()
    ]
    kinds = [_kind(io, kind) for kind in node.RETURN_TYPES]
    schema = io.Schema(
        node_id=node.__name__,
        display_name=node.DISPLAY_NAME,
        category=node.CATEGORY,
        description=node.DESCRIPTION,
        inputs=inputs,
        outputs=[kind.Output(display_name=name) for kind, name in zip(kinds, outputs, strict=True)],
        is_output_node=getattr(node, "OUTPUT_NODE", False),
    )

    def define_schema(cls: type) -> Any:
        return schema

    def execute(cls: type, /, **given: Any) -> Any:
        found = getattr(node(), node.FUNCTION)(**given)
        if isinstance(found, dict):
            return io.NodeOutput(*found["result"], ui=found["ui"])
        return io.NodeOutput(*found)

    body = {"define_schema": classmethod(define_schema), "execute": classmethod(execute), "__doc__": node.__doc__}
    return type(node.__name__, (io.ComfyNode,), body)


def _kind(io: Any, kind: object) -> Any:
    return (
        io.Combo if isinstance(kind, list) else {"MODEL": io.Model, "STRING": io.String, "FLOAT": io.Float}[str(kind)]
    )


def _input(io: Any, name: str, optional: bool, kind: object, details: dict[str, Any]) -> Any:
    given = {**details, "optional": optional}
    given.pop("round", None)
    if isinstance(kind, list):
        given["options"] = kind
    return _kind(io, kind).Input(name, **given)
