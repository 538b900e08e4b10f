"""The tokens that an environment's answer becomes, between two turns of the model.

What the model drew stays as it drew it: nothing is decoded and encoded again. Only the answer is
encoded, with what the chat template puts around it: the end of the assistant's message, the message
of the answer, the beginning of the assistant's next one. An answer may be what a program of the
model has printed: where it spells a special token, it gets the letters of the name and no token.
"""

from __future__ import annotations

from gdpo_megatron.data.tokenizer import Tokenizer
from gdpo_megatron.errors import InputError

_TURN, _PADDED = "ASSISTANT-TURN", " OBSERVATION "
_CUT = "\n... (cut)"


class ObservationEncoder:
    """Encodes observations.

    Args:
        tokenizer: of the policy.
        role: of the message that an observation becomes; None appends the text as it is.
        max_tokens: of an observation's text.

    Raises:
        InputError: a role, but the tokenizer has no chat template, or one that refuses the role or
            does not show the message.
    """

    def __init__(self, tokenizer: Tokenizer, *, role: str | None, max_tokens: int):
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._cut_tokens = len(tokenizer.encode_further(_CUT))
        self._before, self._after, self._is_trimmed = "", "", False
        if role is not None:
            try:
                text = _after_turn(tokenizer, role, _PADDED)
            except InputError as error:
                problems = [f"rollout.environment.observation_role: {it}" for it in error.problems]
                raise InputError(problems) from error
            self._is_trimmed = _PADDED not in text
            shown = _PADDED.strip() if self._is_trimmed else _PADDED
            self._before, _, self._after = text.partition(shown)

    def encode(self, observation: str, last_token_id: int) -> tuple[list[int], str]:
        """Return the tokens that follow a turn, and the observation's text as it was given.

        Args:
            observation: its text.
            last_token_id: the turn's last token; where the template puts the same one first, the
                model has already written it.
        """
        observation = self._cut(observation.strip() if self._is_trimmed else observation)
        encode = self._tokenizer.encode_further
        words = encode(observation, names_are_words=True)
        if words == encode(observation):
            token_ids = encode(self._before + observation + self._after)
        else:
            token_ids = [*encode(self._before), *words, *encode(self._after)]
        if self._before and token_ids[0] == last_token_id:
            del token_ids[0]
        return token_ids, observation

    def _cut(self, observation: str) -> str:
        token_ids = self._tokenizer.encode_further(observation, names_are_words=True)
        if len(token_ids) <= self._max_tokens:
            return observation
        kept = token_ids[: max(0, self._max_tokens - self._cut_tokens)]
        return self._tokenizer.decode(kept, skip_special_tokens=False).rstrip("\ufffd") + _CUT


def _after_turn(tokenizer: Tokenizer, role: str, observation: str) -> str:
    """The template's text from the end of the assistant's words on, with an observation in it."""
    messages = [
        {"role": "user", "content": "USER-TURN"},
        {"role": "assistant", "content": _TURN},
        {"role": role, "content": observation},
    ]
    _, mark, text = tokenizer.render_chat(messages).partition(_TURN)
    if not mark or _TURN in text:
        raise InputError(
            f"the chat template of {tokenizer.path} does not show an assistant's words once, as "
            "they are"
        )
    if observation.strip() not in text:
        raise InputError(
            f"the chat template of {tokenizer.path} leaves out a message of role '{role}'"
        )
    return text
