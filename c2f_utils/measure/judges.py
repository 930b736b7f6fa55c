"""Judges: which of two answers is better, or how good is one? One protocol, verdicts that are kept, plain rows.

A judge is asked about answers in the order in which they are shown (`Case`), and says a value and whether it could be
read (`Opinion`). Every pair is shown in both orders; a win counts only if both agree. What was said is appended to a
JSON Lines file under a hash of what was asked, so that nothing is asked twice (`Verdicts`).

A verdict row, which everything that counts verdicts reads, is plain JSON:

    question  id of the question (text or whole number)
    category  of the question
    turn      1 or 2: the turn that was judged
    model_a, model_b  names of the two models, the same in both orders
    order     "ab": model_a's answer was shown first; "ba": model_b's
    p_a       preference for model_a's answer, in [0, 1], whichever was shown first; 0.5 is a tie; null if not ok
    tokens_a, tokens_b  lengths of the judged turn's answers, tokens
    judge     the judge's id
    ok        whether a verdict could be read; rows that are not ok are counted, never dropped
    key       hash under which the verdict is kept
"""
