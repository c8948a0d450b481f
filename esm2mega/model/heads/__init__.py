"""Predicts per protein, residue or pair: heads of tasks, and the model that has one instead of an LM head."""

from __future__ import annotations

from esm2mega.model.heads.task_heads import MLPHead, TaskHead, head_of_task

__all__ = ["MLPHead", "TaskHead", "head_of_task"]
