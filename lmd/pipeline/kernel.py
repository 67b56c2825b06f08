"""A kernel's client that hears every answer.

Jupyter's client reads its sockets with asyncio and sends past it, through a plain view of the same
socket. ZeroMQ tells of news once only, and a send takes note of it: an answer that arrives while a
widget's message is sent lies in the queue, and the reader is never woken. Seen with pyzmq 27.3,
jupyter_client 8.10 and nbclient 0.11, in cells that make widgets.
"""

from contextlib import suppress
from queue import Empty
from typing import Any

from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from traitlets import Type

LOOK_AGAIN_S = 1.0


class PatientChannel(AsyncZMQSocketChannel):
    """A channel that looks into its queue now and then, whether it was woken or not."""

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:
        """The next message.

        Args:
            timeout: seconds to wait; None: as long as it takes.

        Raises:
            queue.Empty: none came in that time.
        """
        while timeout is None:
            with suppress(Empty):
                return await super().get_msg(timeout=LOOK_AGAIN_S)
        return await super().get_msg(timeout=timeout)


class KernelClient(AsyncKernelClient):
    """Jupyter's client with patient channels."""

    shell_channel_class = Type(PatientChannel)
    iopub_channel_class = Type(PatientChannel)
