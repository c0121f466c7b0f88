// A dashboard's JSON drawn from what a Prometheus server has, once, for a picture.
//
// The address says what to draw: ?dashboard=JSON&prometheus=URL&from=MS&to=MS&scrape=5s. When everything stands, or
// nothing can, the page tells its server.

import { flushSync } from "react-dom";
import { createRoot } from "react-dom/client";
import { createTheme, dateTime, ThemeContext } from "@grafana/data";
import { GlobalStyles } from "@grafana/ui";
import { box, Dashboard } from "./panels.jsx";
import { Prometheus } from "./prometheus.js";

const DRAWN = new Set(["row", "timeseries", "heatmap"]);
// Milliseconds that icons may take to appear.
const ICONS = 500;

async function draw() {
  const asked = new URLSearchParams(location.search);
  const dashboard = await (await fetch(asked.get("dashboard"))).json();
  const [from, to] = ["from", "to"].map((end) => dateTime(Number(asked.get(end))));
  const range = { from, to, raw: { from, to } };
  const theme = createTheme({ colors: { mode: "dark" } });
  const variables = Object.fromEntries(dashboard.templating.list.map(({ name, allValue }) => [name, allValue]));
  const server = new Prometheus(asked.get("prometheus"), { range, scrape: asked.get("scrape"), variables, theme });

  const found = new Map();
  for (const panel of dashboard.panels) {
    check(panel);
    if (panel.type !== "row") {
      found.set(panel.id, await server.frames(panel, box(panel.gridPos, innerWidth).width));
    }
  }

  const root = createRoot(document.getElementById("dashboard"));
  const show = (content) =>
    flushSync(() =>
      root.render(
        <ThemeContext.Provider value={theme}>
          <GlobalStyles />
          {content}
        </ThemeContext.Provider>,
      ),
    );
  // A canvas does not wait for its fonts.
  show(null);
  await Promise.all([400, 500].map((weight) => document.fonts.load(`${weight} 12px Inter`)));
  show(<Dashboard {...{ dashboard, found, range }} width={innerWidth} />);
  await new Promise((resolve) => setTimeout(resolve, ICONS));
}

/** What this page would draw wrongly is refused. */
function check({ type, title, fieldConfig }) {
  if (!DRAWN.has(type) || fieldConfig?.overrides?.length) {
    throw new Error(`panel ${title}: type ${type} or its overrides are not drawn here`);
  }
}

const tell = (what) => fetch("told", { method: "POST", body: what });
addEventListener("error", ({ message }) => tell(message));
draw().then(
  () => tell("drawn"),
  (error) => tell(String(error)),
);
