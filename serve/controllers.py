"""vLLM's own adapter routes, as the controllers of vLLM fleets call them.

`POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter` with vLLM's bodies, texts and statuses:
production-stack, llm-d and AIBrix send them to every replica, and read "has already been loaded"
in a 400 as success. What they do goes through the registry like any other change; they need the
admin scope.
"""

from __future__ import annotations

from fastapi import APIRouter, FastAPI
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from serve.adapters.rows import Alias
from serve.admin import Text, by, counted
from serve.errors import AdapterMissing, BadRequest, Conflict, NotFound
from serve.serving import Serving

PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")


class Load(BaseModel):
    """vLLM's LoadLoRAAdapterRequest."""

    lora_name: Text
    lora_path: Text
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class Unload(BaseModel):
    """vLLM's UnloadLoRAAdapterRequest; like vLLM, goes by the name."""

    lora_name: Text
    lora_int_id: int | None = None


def routes(app: FastAPI) -> APIRouter:
    router = APIRouter()

    def serving() -> Serving:
        found: Serving = app.state.quantserve
        return found

    @router.post(PATHS[0])
    async def load_lora_adapter(body: Load) -> PlainTextResponse:
        if not body.lora_name or not body.lora_path:
            raise BadRequest("Both 'lora_name' and 'lora_path' must be provided.")
        if body.is_3d_lora_weight:
            raise BadRequest(
                "adapters of stacked expert weights cannot be checked against the base here",
                param="is_3d_lora_weight",
            )
        await _load(serving(), body)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post(PATHS[1])
    async def unload_lora_adapter(body: Unload) -> PlainTextResponse:
        if not body.lora_name:
            raise BadRequest("'lora_name' needs to be provided to unload a LoRA adapter.")
        try:
            await serving().catalog.delete(body.lora_name, by())
        except NotFound as fault:
            raise NotFound(
                f"The lora adapter '{body.lora_name}' cannot be found.", param="lora_name"
            ) from fault
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


async def _load(serving: Serving, body: Load) -> Alias:
    change = serving.catalog.put(body.lora_name, body.lora_path, by(), new=not body.load_inplace)
    try:
        return await counted(serving, change)
    except AdapterMissing as fault:
        raise NotFound(str(fault), param="lora_path") from fault
    except Conflict as fault:
        if body.load_inplace:
            raise
        raise BadRequest(
            f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load "
            "the adapter in place, set 'load_inplace' to True.",
            param="lora_name",
        ) from fault
