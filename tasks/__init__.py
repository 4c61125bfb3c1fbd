"""The built-in tasks, a file each: prompts, and how responses to them are scored, see rewards.Task."""

FILES = {"tools": "tools", "reply": "reply", "reply-25": "reply", "reply-capped": "reply", "rlla": "rlla",  # --task
         "rar-medicine": "rubrics", "rar-science": "rubrics", "rubric": "rubrics", "healthbench": "healthbench",
         "gpqa": "gpqa", "bfcl": "bfcl"}  # the file of each here
