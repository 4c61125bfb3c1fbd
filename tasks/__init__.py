"""The built-in tasks: prompts and how responses to them are scored, see rewards.Task. One file each."""

FILES = {  # --task: its file here
    "tools": "tools",
    "rlla": "rlla",
    "rar-medicine": "rubrics", "rar-science": "rubrics", "rubric": "rubrics",
    "healthbench": "healthbench",
    "gpqa": "gpqa",
    "bfcl": "bfcl",
}
