"""What is asked, what is an answer, is it right? Problems with a checker, prompts and samples, preference pairs."""
