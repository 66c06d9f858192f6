"""Saved slots between two raylets: whole, private, and nothing left where something failed."""

import asyncio
import os
import stat

import pytest
import ray

from lltm_ray.actors.transfer import RayFiles
from lltm_ray.llamacpp.slot_folder import CHUNK_BYTES, SlotFolder, new_name
from lltm_ray.records import EngineInfo, EngineState

SIZE = 2 * CHUNK_BYTES + 12_345


@pytest.fixture
def ends(ray_cluster, tmp_path):
    """An engine on each of two nodes."""
    node = ray_cluster.add_node(num_cpus=1)
    ray_cluster.wait_for_nodes()
    ids = [ray.get_runtime_context().get_node_id(), node.node_id]
    made = []
    for name, node_id in zip(("e0", "e1"), ids, strict=True):
        (tmp_path / name).mkdir(mode=0o700)
        folder = str(tmp_path / name)
        made.append(EngineInfo(name=name, model="tiny", state=EngineState.READY, node_id=node_id, slot_folder=folder))
    yield made
    ray_cluster.remove_node(node)


def test_a_file_goes_from_node_to_node_or_not_at_all(ends):
    asyncio.run(go_from_node_to_node(*ends))


async def go_from_node_to_node(source, target):
    files = RayFiles(source.node_id)
    here, there, name = SlotFolder(source.slot_folder), SlotFolder(target.slot_folder), new_name()
    data = os.urandom(SIZE)
    here.create(name)
    here.write(name, 0, data)
    await files.carry(source, target, name)
    assert there.read(name, 0, SIZE + 1) == data
    assert stat.S_IMODE(there.path_of(name).stat().st_mode) == 0o600
    await files.carry(source, target, name)  # there already, as in a folder that both nodes see
    await files.remove(target, name)
    await files.remove(target, name)
    assert there.size(name) is None

    with pytest.raises(OSError, match="is not in the folder of e0"):
        await files.carry(source, target, new_name())
    with pytest.raises(OSError, match="is no name of a saved slot"):
        await files.remove(target, "../e0/" + name)
    gone = target.with_(slot_folder=target.slot_folder + "/gone")
    with pytest.raises(OSError, match="No such file or directory"):
        await files.carry(source, gone, name)
    assert (here.read(name, 0, SIZE), os.listdir(target.slot_folder)) == (data, [])
    await files.remove(source, name)
    assert os.listdir(source.slot_folder) == []
