// A heatmap of histogram buckets. Grafana's own is a part of its server's pages and in no package: chart and axes are
// the packages', the cells are drawn here.

import { interpolateOranges } from "d3-scale-chromatic";
import { AxisPlacement, ScaleDirection, ScaleOrientation } from "@grafana/schema";
import { UPlotChart, UPlotConfigBuilder, useTheme2 } from "@grafana/ui";

// Pixels between two labels of an axis, at least.
const LABEL = 22;

/** `frames` have the cumulative counts of a bucket each, with its bound in the label `le`. */
export function Heatmap({ frames, range, width, height }) {
  const theme = useTheme2();
  const buckets = frames.map(bucket).sort((one, other) => one.bound - other.bound);
  const upTo = (i, time) => buckets[i]?.at.get(time) ?? 0;
  const counts = buckets.map((_, i) => (time) => Math.max(upTo(i, time) - upTo(i - 1, time), 0));
  const times = [...new Set(buckets.flatMap(({ at }) => [...at.keys()]))].sort((one, other) => one - other);
  const most = Math.max(...counts.flatMap((count) => times.map(count)));
  const skipped = Math.ceil((buckets.length * LABEL) / height);
  const step = frames[0].fields[0].config.interval;

  const builder = new UPlotConfigBuilder();
  builder.addScale({
    scaleKey: "x",
    isTime: true,
    orientation: ScaleOrientation.Horizontal,
    direction: ScaleDirection.Right,
    range: () => [range.from.valueOf(), range.to.valueOf()],
  });
  builder.addScale({
    scaleKey: "y",
    orientation: ScaleOrientation.Vertical,
    direction: ScaleDirection.Up,
    range: () => [0, buckets.length],
  });
  builder.addAxis({ scaleKey: "x", isTime: true, placement: AxisPlacement.Bottom, theme });
  builder.addAxis({
    scaleKey: "y",
    placement: AxisPlacement.Left,
    theme,
    grid: { show: false },
    splits: buckets.map((_, i) => i + 0.5),
    values: buckets.map(({ bound }, i) => (i % skipped ? "" : bound === Infinity ? "+Inf" : String(bound))),
  });
  builder.addSeries({ scaleKey: "y", theme, pathBuilder: () => null, pointsBuilder: () => undefined });
  builder.addHook("draw", (plot) => {
    counts.forEach((count, row) => {
      const [bottom, top] = [row, row + 1].map((edge) => plot.valToPos(edge, "y", true));
      for (const time of times) {
        const share = count(time) / most;
        const [left, right] = [time - step, time].map((edge) => plot.valToPos(edge, "x", true));
        if (share > 0 && left >= plot.bbox.left) {
          plot.ctx.fillStyle = interpolateOranges(theme.isDark ? 1 - share : share);
          plot.ctx.fillRect(left, top, right - left - 1, bottom - top - 1);
        }
      }
    });
  });
  return <UPlotChart config={builder} data={[times, times.map(() => null)]} width={width} height={height} />;
}

function bucket({ fields: [times, counts] }) {
  const bound = counts.labels.le === "+Inf" ? Infinity : Number(counts.labels.le);
  return { bound, at: new Map(times.values.map((time, i) => [time, counts.values[i]])) };
}
