"""Nodes for ComfyUI. This folder is also an entry of `custom_nodes`, where stg_hooks is installed."""

from stg_hooks.integrations.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from stg_hooks.integrations.comfyui.v3 import comfy_entrypoint

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "comfy_entrypoint"]
