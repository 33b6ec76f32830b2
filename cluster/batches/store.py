"""What the endpoints of files and batches work with."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from manta.cluster.batches.database import Database, open_folder


@dataclass(frozen=True, slots=True)
class BatchStore:
    """One frontend's view of the folder of --batch-dir."""

    database: Database
    max_file_bytes: int  # of an upload
    max_tenant_bytes: int  # of the files of a tenant
    news: asyncio.Event = field(default_factory=asyncio.Event)  # set when there may be something to do

    @property
    def folder(self) -> Path:
        return self.database.folder

    @classmethod
    async def open(cls, folder: Path, max_file_bytes: int, max_tenant_bytes: int) -> "BatchStore":
        """Raises StorageError."""
        await asyncio.to_thread(open_folder, folder)
        database = Database(folder)
        await database.open()
        return cls(database, max_file_bytes, max_tenant_bytes)

    async def close(self) -> None:
        await self.database.close()
