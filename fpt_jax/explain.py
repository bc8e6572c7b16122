"""What the transformers attend to: heat maps over images, and JSON (as fig. 1(e) of the paper).

Shapes: B = 1 image, S positions, h w rows and columns of a level, H W those of an image.
"""

import collections
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from fpt_jax.data.records.images import encode_png
from fpt_jax.errors import UserError
from fpt_jax.restored import Restored
from fpt_jax.run.folder import make_folder, run_folder, write_whole
from fpt_jax.run.json_lines import JsonLines, lines_of
from fpt_jax.run.progress import Progress
from fpt_jax.tasks.attention_pictures import Map, Row, draw, transformer_name
from fpt_jax.tasks.queries import Query
from fpt_jax.tasks.subjects import LeftOut, Subject, unused_path
from fpt_jax.tasks.task import task_of

FOLDER = "explain"
POINTS_PER_CALL = 8  # positions that are explained in one call of the compiled function


def explain(
  restored: Restored,
  subjects: Iterator[Subject | UserError],
  total: int,
  workdir: str,
  *,
  points: Sequence[tuple[float, float]],
  min_score: float,
) -> None:
  """Draws what the transformers of a trained model attend to from chosen positions.

  Writes `explain/<name>.png` for every image: one row per position and level, one column per level that it
  takes from. `explain/explain.jsonl` gets the numbers of each image: the weights of the mixtures, and the
  entropy and the peak of each map. At the end, or when an error ends the work, `explain/explain.json` is
  made from it. Where the ground truth says which objects tell the class of others (Context Shapes), the
  share of the attention that is on them is logged, beside their share of the image.

  Args:
    restored: the model.
    subjects: the images; an image that cannot be read is an error in its place.
    total: number of images, for the progress bar.
    workdir: folder of the run, on a disk or in a bucket.
    points: (x, y) in pixels of the images; if empty, the task chooses positions from its predictions.
    min_score: lowest score of a detection that is chosen.

  Raises:
    UserError: the model has no transformers; images could not be read or a point was outside them, and the
      others are done; or a file could not be written.
  """
  config = restored.config
  task = task_of(config).QUERIES
  if task is None or not has_transformers(config.model):
    raise UserError(f"the model in {workdir} has no transformers to explain; it is a baseline")
  out = run_folder(workdir) / FOLDER
  make_folder(out)
  rows_of = explainer(restored)
  shares: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
  taken: set[str] = set()
  left_out = LeftOut()
  lines = JsonLines(out / "explain.jsonl")
  done = drawn = 0

  def explain_one(subject: Subject) -> list[Row]:
    image_HWC = subject.image_HWC
    view = task.view(config, image_HWC)
    size = view["size_B2"][0].tolist()
    queries = [Query(f"({x:g}, {y:g})", x, y) for x, y in points]
    if not points:
      queries = task.queries(config, image_HWC, restored.infer(image_HWC), size, min_score)
    rows = rows_of(view, image_HWC, queries)
    if rows:
      path = unused_path(out, subject.stem, taken)
      write_whole(path, encode_png(draw(image_HWC, size, rows, task.level_name)))
    described = [entry(row, image_HWC, size, task.level_name) for row in rows]
    lines.write([{"file_name": subject.name} | subject.place | {"rows": described}])
    if subject.truth is not None:
      questions = task.questions(config, image_HWC, subject.truth, size)
      answer_of = {question.query: question.answer_HW for question in questions}
      for row in rows_of(view, image_HWC, list(answer_of)):
        for source, seen in row.maps.items():
          if seen.mixture:  # the maps of RT are not attention
            name = transformer_name(row.level, source, task.level_name)
            shares[name].append(share_on(seen, answer_of[row.query], size))
    return rows

  try:
    with lines, Progress("explain", total) as progress:
      for subject in subjects:
        if isinstance(subject, UserError):
          left_out.add(subject)
        elif error := outside(points, subject):
          left_out.add(error)
        else:
          drawn += bool(explain_one(subject))
          done += 1
        progress.advance()
  finally:
    summary = {name: np.mean(pairs, axis=0).tolist() for name, pairs in shares.items()}
    if done:
      entries = [json.loads(line) for line in lines_of(lines.path)]
      content = json.dumps({"images": entries, "attention_on_answers": summary}, indent=1)
      write_whole(out / "explain.json", content)
  left_out.check(done, out)
  if drawn < done:
    logging.warning(
      "%d of %d images have no detection with a score of at least %g; lower --min_score",
      *(done - drawn, done, min_score),
    )
  logging.info("%d pictures and explain.json in %s", drawn, out)
  if summary:
    logging.info("%s", format_summary(summary))


def has_transformers(model: ConfigDict) -> bool:
  """Returns whether a model has at least one of the three transformers."""
  fpt = model.fpt
  return fpt.enabled and (
    fpt.self_transformer or fpt.grounding_transformer or fpt.rendering_transformer
  )


def explainer(restored: Restored) -> Callable[..., list[Row]]:
  """Returns a function of a view, its image and queries that returns the rows of each query."""

  @jax.jit
  def compute(arrays, view, points_BS2):
    model = restored.structure.fill(arrays)
    levels = model.fpt_levels(view["image_BHWC"], view["size_B2"])
    return model.fpt.explain(levels, points_BS2), [level.stride for level in levels]

  def rows_of(
    view: dict[str, np.ndarray], image_HWC: np.ndarray, queries: Sequence[Query]
  ) -> list[Row]:
    ratio_2 = view["size_B2"][0] / np.array(image_HWC.shape[:2])
    rows = []
    for start in range(0, len(queries), POINTS_PER_CALL):
      block = queries[start : start + POINTS_PER_CALL]
      points_S2 = np.zeros((POINTS_PER_CALL, 2), np.float32)
      points_S2[: len(block)] = [(q.y, q.x) * ratio_2 for q in block]
      found, strides = jax.device_get(compute(restored.arrays, view, points_S2[None]))
      for s, query in enumerate(block):
        for level in range(len(strides)) if query.level is None else [query.level]:
          taken = {source: e for (i, source), e in found.items() if i == level}
          maps = {
            k: Map(
              e.map_BShw[0, s],
              int(strides[k]),
              float(e.entropy_BS[0, s]),
              () if e.mixture_BM is None else tuple(e.mixture_BM[0].tolist()),
            )
            for k, e in taken.items()
          }
          rows.append(Row(query, level, maps))
    return rows

  return rows_of


def parsed_points(text: str) -> list[tuple[float, float]]:
  """Returns the points of a text such as "10,20;30.5,40".

  Raises:
    UserError: the text has another form.
  """
  try:
    return [(float(x), float(y)) for x, y in (p.split(",") for p in text.split(";") if p.strip())]
  except ValueError:
    raise UserError(f"--points={text} must have the form x,y;x,y;... in pixels") from None


def outside(points: Sequence[tuple[float, float]], subject: Subject) -> UserError | None:
  """Returns the error that a point is outside an image, if one is."""
  height, width = subject.image_HWC.shape[:2]
  for x, y in points:
    if not (0 <= x < width and 0 <= y < height):
      return UserError(
        f"--points: ({x:g}, {y:g}) is outside {subject.name}, which is {width} pixels wide and {height} "
        "high"
      )
  return None


def share_on(seen: Map, answer_HW: np.ndarray, size: Sequence[int]) -> tuple[float, float]:
  """Returns the share of a map's weight that is on the objects, and their share of the image.

  A position that the objects cover in part counts in part.

  Args:
    seen: the map, on a canvas.
    answer_HW: bool, the objects' pixels in the image.
    size: (height, width) of the image on the canvas.
  """
  height, width = size
  resized = Image.fromarray(answer_HW).resize((width, height), Image.Resampling.NEAREST)
  on_answer = np.asarray(resized).astype(np.float64)
  # each pixel belongs to the position that is centred nearest to it
  rows_H, columns_W = (
    np.minimum((np.arange(edge) + seen.stride // 2) // seen.stride, positions - 1)
    for edge, positions in zip(size, seen.weight_hw.shape, strict=True)
  )
  pixels_hw, answered_hw = np.zeros((2, *seen.weight_hw.shape))
  np.add.at(pixels_hw, (rows_H[:, None], columns_W), 1)
  np.add.at(answered_hw, (rows_H[:, None], columns_W), on_answer)
  share = float(np.sum(seen.weight_hw * answered_hw / np.maximum(pixels_hw, 1)))
  return share, float(on_answer.mean())


def format_summary(summary: Mapping[str, Sequence[float]]) -> str:
  """Formats mean shares of the attention and of the image as one line per transformer and a mean."""

  def line(name: str, attention: float, area: float) -> str:
    ratio = attention / max(area, 1e-9)
    return (
      f"{name}: {100 * attention:.1f} % of the attention, {ratio:.1f} times the share of the area"
    )

  attention, area = np.mean(list(summary.values()), axis=0)
  return "\n".join(
    [
      f"attention on the objects that answer the questions ({100 * area:.1f} % of the image)",
      *(line(name, *shares) for name, shares in summary.items()),
      line("mean", attention, area),
    ]
  )


def entry(
  row: Row, image_HWC: np.ndarray, size: Sequence[int], level_name: Callable[[int], str]
) -> dict[str, Any]:
  """Returns the numbers of a row for `explain.json`; positions are in pixels of the image."""
  query, sources = row.query, []
  ratio_2 = np.array(image_HWC.shape[:2]) / np.array(size)
  for source, seen in row.maps.items():
    weight_hw = seen.weight_hw
    peak_2 = np.array(np.unravel_index(np.argmax(weight_hw), weight_hw.shape))
    y, x = ((peak_2 * seen.stride + 0.5) * ratio_2).tolist()
    sources.append(
      {
        "transformer": transformer_name(row.level, source, level_name),
        "mixture": [round(weight, 4) for weight in seen.mixture],
        "entropy": round(seen.entropy, 4),
        "outside": round(seen.outside, 4),
        "peak": {"x": round(x, 1), "y": round(y, 1), "weight": round(float(weight_hw.max()), 6)},
      }
    )
  described = {"name": query.name, "x": round(query.x, 1), "y": round(query.y, 1)}
  return described | {"level": level_name(row.level), "sources": sources}
