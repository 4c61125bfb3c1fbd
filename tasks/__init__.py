"""The built-in tasks, a file each: prompts, and how responses to them are scored, see rewards.Task."""

FILES = {  # --task: its file here
    "tools": "tools", "reply": "reply", "reply-25": "reply", "rlla": "rlla", "rar-medicine": "rubrics",
    "rar-science": "rubrics", "rubric": "rubrics", "healthbench": "healthbench", "gpqa": "gpqa", "bfcl": "bfcl"}
