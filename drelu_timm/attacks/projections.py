"""The projection that FAB takes every step: onto a hyperplane, as far as it runs through [0, 1]^D."""

import torch
from torch import Tensor

from .threat_model import Norm


def shortest_move(points: Tensor, normals: Tensor, offsets: Tensor, norm: Norm) -> Tensor:
    r"""The shortest move from each point to its hyperplane that stays in [0, 1]; the longest where none gets there.

    Along it every coordinate goes at its own pace (1 for Linf, \|normal\| for L2) until it meets the box. So the way
    made towards the hyperplane is a concave, piecewise linear function of time, and Newton's method from time 0 comes
    to the exact time from below: in some five passes of O(D), where pyautoattack sorts the coordinates.

    Args:
        points: [B, D] in [0, 1].
        normals: [B, D].
        offsets: [B]; the hyperplane holds every x with <normal, x> = offset.
        norm: "Linf" or "L2": in which the move is shortest.

    Returns:
        [B, D], to be added to ``points``; 0 where the normal is 0.
    """
    missing = offsets - (normals * points).sum(dim=1)
    direction = normals * missing.sign().unsqueeze(1)
    weights = normals.abs()
    face = torch.gt(direction, 0, out=torch.empty_like(points))  # floats: `where` takes thirty times as long
    room = (face - points).abs()
    if norm == "Linf":
        speeds, meeting = weights, room
    else:
        speeds, meeting = weights.square(), (room / weights).nan_to_num(nan=0.0)
    reach = weights * room
    time, limits, free = torch.zeros_like(offsets), torch.finfo(points.dtype), torch.empty_like(points)
    for _ in range(points.shape[1]):  # every pass but the last finds a coordinate that met the box
        torch.gt(meeting, time.unsqueeze(1), out=free)
        remaining = missing.abs() - (reach * (1 - free)).sum(dim=1)
        later = (remaining / (speeds * free).sum(dim=1).clamp(min=limits.tiny)).clamp(max=limits.max)
        if not (later > time).any():
            break
        time = torch.maximum(time, later)
    pace = 1 if norm == "Linf" else weights
    return direction.sign() * torch.minimum(time.unsqueeze(1) * pace, room)
