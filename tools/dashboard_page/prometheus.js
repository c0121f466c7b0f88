// What a Prometheus server answers to a panel's queries, as Grafana's data frames.

import { applyNullInsertThreshold, FieldType, getDisplayProcessor, rangeUtil } from "@grafana/data";

/** The server, and what the dashboard asks of every query: a time range, variables, how often it scrapes. */
export class Prometheus {
  constructor(url, { range, scrape, variables, theme }) {
    Object.assign(this, { url, range, scrape, variables, theme });
  }

  /** Frames of all of a panel's targets, one per series. Throws when the server refuses a query. */
  async frames(panel, width) {
    const { intervalMs } = rangeUtil.calculateInterval(this.range, width, this.scrape);
    const answers = await Promise.all(panel.targets.map((target) => this.#ask(target.expr, intervalMs)));
    const series = answers.flatMap((found, i) => found.map((one) => [one, panel.targets[i].legendFormat]));
    return series.map(([{ metric, values }, legend], seriesIndex) => {
      const times = {
        name: "Time",
        type: FieldType.time,
        config: { interval: intervalMs },
        values: values.map(([at]) => at * 1000),
      };
      const number = {
        name: "Value",
        type: FieldType.number,
        labels: metric,
        // The palette is what Grafana takes where a dashboard names no colours.
        config: {
          color: { mode: "palette-classic" },
          ...panel.fieldConfig.defaults,
          displayNameFromDS: label(legend, metric),
        },
        values: values.map(([, value]) => (Number.isFinite(Number(value)) ? Number(value) : null)),
        state: { seriesIndex },
      };
      number.display = getDisplayProcessor({ field: number, theme: this.theme });
      // A line breaks where a step has no point, as in Grafana's panel.
      return applyNullInsertThreshold({ frame: { fields: [times, number], length: values.length } });
    });
  }

  async #ask(expression, intervalMs) {
    const step = intervalMs / 1000;
    // Aligned to the step, as Grafana's data source does it, so that all queries have the same points.
    const [start, end] = [this.range.from, this.range.to].map((at) => Math.floor(at.valueOf() / intervalMs) * step);
    const query = this.expression(expression, intervalMs);
    const answer = await fetch(`${this.url}/api/v1/query_range?${new URLSearchParams({ query, start, end, step })}`);
    const found = await answer.json();
    if (found.status !== "success") {
      throw new Error(`${query}: ${found.error}`);
    }
    return found.data.result;
  }

  /** A query without variables. A rate is taken over four scrapes at least, the rule of Grafana's data source. */
  expression(expression, intervalMs) {
    const scrapeMs = rangeUtil.intervalToMs(this.scrape);
    const window = Math.max(intervalMs + scrapeMs, 4 * scrapeMs);
    const values = Object.entries({ ...this.variables, __rate_interval: `${window}ms` });
    return values.reduce((text, [name, value]) => text.replaceAll(`$${name}`, value), expression);
  }
}

/** The legend of a series: a format with its labels filled in. */
function label(format, labels) {
  return format.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, name) => labels[name] ?? "");
}
