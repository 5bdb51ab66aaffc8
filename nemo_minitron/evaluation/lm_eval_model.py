"""A Megatron model as the LM-Evaluation-Harness (`lm_eval`) asks models: registered there as `nemo_minitron`.

Token boundaries, BOS and the cutting of long texts follow its `hf` backend, so that the two agree item by item: the
context's trailing spaces belong to the continuation; a continuation is what follows the context's tokens in the tokens
of both together; what does not fit is cut from the left.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.callbacks.reporter import Reporter
from nemo_minitron.errors import DataError
from nemo_minitron.evaluation.answers import AnswerFile
from nemo_minitron.evaluation.generate import end_tokens
from nemo_minitron.evaluation.scoring import Continuation, Prompt, Score, TokenScorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_NEW_TOKENS = 256
"""Of a task that does not say how long its answers may be; the `hf` backend's."""


class Scorer(Protocol):
    """What the adapter asks of a model: `TokenScorer`, or `Leader` where one rank asks for all."""

    spec: ModelSpec
    batch_size: int

    def score(self, requests: Sequence[Continuation], on_results: Any = ...) -> list[Score]:
        """See `TokenScorer.score`."""
        ...

    def generate(self, requests: Sequence[Prompt], on_results: Any = ...) -> list[str]:
        """See `TokenScorer.generate`."""
        ...


@register_model("nemo_minitron")
class MinitronLM(TemplateLM):  # type: ignore[misc]
    """A model under any tensor x pipeline x data-parallel layout.

    Args:
        scorer: The model.
        tokenizer: Its tokenizer.
        answers: What it has answered before; new answers are added.
        max_length: Tokens the model reads at one time at most; None: its context.
        add_bos_token: Whether texts begin with BOS; None: as the tokenizer does it.
        reporter: Shows how far it is; None: nobody.
        label: What the progress is called.

    With `scorer=Leader(...)`, rank 0 alone runs the harness. With a `TokenScorer` every rank runs it, as under torchrun
    with `create_from_arg_string`.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        answers: AnswerFile | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        reporter: Reporter | None = None,
        label: str = "",
    ) -> None:
        super().__init__()
        self.scorer, self.tokenizer = scorer, tokenizer
        self.answers = AnswerFile(None) if answers is None else answers
        self.reporter, self.label = reporter or Reporter(silent=True), label
        self.max_length = max_length or scorer.spec.max_position_embeddings
        self.add_bos_token = add_bos_token

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "MinitronLM":
        """From `pretrained=FOLDER,tensor=2,pipeline=1,precision=fp32,max_length=...,add_bos_token=...`.

        Args:
            arg_dict: The above; `pretrained` is any checkpoint that `MegatronGPTModel.restore_from` reads.
            additional_config: `batch_size`; the rest is left out.

        Raises:
            DataError: An argument is unknown, or `pretrained` is missing.
        """
        return _from_checkpoint(dict(arg_dict), (additional_config or {}).get("batch_size"))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> "MinitronLM":
        """The same from one text, as `lm_eval` takes it."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # -- tokens --------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token between documents."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, or the end of the document before."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_gen_toks(self) -> int:
        """New tokens, of a task that does not say."""
        return MAX_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """For the harness's own caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; a text that begins with BOS gets no second one."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            special = False
        how = {} if special is None else {"add_special_tokens": special}
        found: list[int] = self.tokenizer.encode(string, **how)
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as the text that the model's chat template makes of them."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    # -- requests ------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether greedy decoding would give it."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = [self._fitting(context, continuation) for _, context, continuation in requests]
        self._tell_cut([len(context) for _, context, _ in requests], [len(one.context) for one in asked])
        scores = self._score(asked)
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of complete texts in nats: each token once, in windows of the model's context."""
        windows: list[Continuation] = []
        counts = []
        for request in requests:
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [Continuation(tuple(a), tuple(b)) for a, b in map(make_disjoint_window, pairs)]
            windows += own
            counts.append(len(own))
        scores = iter(self._score(windows))
        return [sum(next(scores).logprob for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy texts up to a stop sequence, the end of the document or the number of tokens that the task allows.

        Raises:
            DataError: A task asks for samples, or for more tokens than fit behind any context.
        """
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        prompts = [self._prompt(context, request.args[1]) for context, request in zip(contexts, requests, strict=True)]
        self._tell_cut(list(map(len, contexts)), [len(one.tokens) for one in prompts])
        keys: list[tuple[Any, ...]] = [("generate", *map(list, (one.tokens, one.until)), one.count) for one in prompts]
        open_ones = [index for index, key in enumerate(keys) if self.answers.get(*key) is None]

        def keep(results: Mapping[int, str]) -> None:
            self.answers.add([(keys[open_ones[index]], text) for index, text in results.items()])
            progress.advance(len(results))

        done = len(keys) - len(open_ones)
        with self.reporter.progress(self.label, len(keys), unit="answers", done=done) as progress:
            self.scorer.generate([prompts[index] for index in open_ones], keep)
        return [self.answers.get(*key) for key in keys]

    def _score(self, requests: Sequence[Continuation]) -> list[Score]:
        keys: list[tuple[Any, ...]] = [("score", list(one.context), list(one.tokens)) for one in requests]
        open_ones = [index for index, key in enumerate(keys) if self.answers.get(*key) is None]

        def keep(results: Mapping[int, Score]) -> None:
            self.answers.add(
                [(keys[open_ones[index]], [score.logprob, score.is_greedy]) for index, score in results.items()]
            )
            progress.advance(len(results))

        done = len(keys) - len(open_ones)
        with self.reporter.progress(self.label, len(keys), unit="texts", done=done) as progress:
            scores = self.scorer.score([requests[index] for index in open_ones], keep)
        found = dict(zip(open_ones, scores, strict=True))
        return [found[index] if index in found else Score(*self.answers.get(*key)) for index, key in enumerate(keys)]

    def _fitting(self, context: Sequence[int], continuation: Sequence[int]) -> Continuation:
        """A continuation with as much of its context, from the end, as the model can read."""
        if len(continuation) > self.max_length:
            raise DataError(
                f"a task's answer of {len(continuation)} tokens",
                rule=f"at most {self.max_length}, the tokens that the model reads at one time",
                remedy="leave the task out",
            )
        tokens = [*context, *continuation][-(self.max_length + 1) :]
        start = len(tokens) - len(continuation)
        return Continuation(tuple(tokens[:start]), tuple(tokens[start:]))

    def _tell_cut(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Say how many contexts lost their beginning, which changes what a task measures."""
        if cut := sum(less < all_ for less, all_ in zip(after, before, strict=True)):
            self.reporter.line(
                f"          {self.label}: {cut:,} of {len(before):,} contexts are longer than the model reads "
                f"({self.max_length:,} tokens), and lost their beginning"
            )

    def _prompt(self, context: Sequence[int], settings: dict[str, Any]) -> Prompt:
        how = normalize_gen_kwargs(settings, self.max_gen_toks)
        if how.get("do_sample") or how.get("temperature"):
            raise DataError(
                f"a task asks for sampled answers: {settings}",
                rule="answers are greedy here",
                remedy="set do_sample: false in the task's generation_kwargs, or leave the task out",
            )
        count = int(how["max_gen_toks"])
        if count >= self.max_length:
            raise DataError(
                f"a task asks for answers of {count} tokens",
                rule=f"fewer than the model's context of {self.max_length}",
                remedy="set max_gen_toks in the task's generation_kwargs, or leave the task out",
            )
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        until = handle_stop_sequences(how.get("until"), eos=end)
        return Prompt(tuple(context[-(self.max_length - count) :]), tuple(until), count)


def _from_checkpoint(arguments: dict[str, Any], batch_size: Any) -> MinitronLM:
    from nemo_minitron.config.model_settings import ModelSettings
    from nemo_minitron.config.parallel import ParallelConfig, Precision
    from nemo_minitron.data.tokenizer import load_tokenizer
    from nemo_minitron.models.gpt import MegatronGPTModel

    told = dict(arguments)
    path = told.pop("pretrained", None)
    parallel = ParallelConfig(tensor=int(told.pop("tensor", 1)), pipeline=int(told.pop("pipeline", 1)))
    precision = Precision(told.pop("precision", "fp32"))
    own = {name: told.pop(name) for name in ("max_length", "add_bos_token") if name in told}
    batch_size = told.pop("batch_size", batch_size)
    if path is None or told:
        raise DataError(
            f"model_args {arguments}",
            rule="pretrained=FOLDER, and if wanted tensor, pipeline, precision, max_length, add_bos_token, batch_size",
        )
    settings = ModelSettings(parallel=parallel, precision=precision)
    model = MegatronGPTModel.restore_from(path, settings=settings)
    tokenizer = load_tokenizer(model.tokenizer_files)
    scorer = TokenScorer(
        model.chunks,
        model.runtime,
        batch_size=8 if batch_size in (None, "auto") else int(batch_size),
        decode=tokenizer.decode,
        ends=end_tokens(tokenizer, model.tokenizer_files),
    )
    return MinitronLM(scorer, tokenizer, **own)
