// The panels of a dashboard where it has them, drawn by Grafana's components.

import { dateTimeFormat, EventBusSrv } from "@grafana/data";
import { Icon, PanelChrome, PanelContextProvider, Text, TimeSeries } from "@grafana/ui";
import { Heatmap } from "./heatmap.jsx";

// Grafana's grid: columns, and pixels of a row and between two panels.
const COLUMNS = 24;
const ROW = 30;
const GAP = 8;

/** Pixels of a panel's box in a dashboard of a width. */
export function box({ x, y, w, h }, width) {
  const column = (width - GAP * (COLUMNS + 1)) / COLUMNS;
  const across = (cells) => cells * column + (cells - 1) * GAP;
  return {
    left: GAP + x * (column + GAP),
    top: y * (ROW + GAP),
    width: across(w),
    height: h * ROW + (h - 1) * GAP,
  };
}

/** The whole dashboard. `found` has the frames of its panels, by their ids. */
export function Dashboard({ dashboard, found, range, width }) {
  const [from, to] = [range.from, range.to].map((at) => dateTimeFormat(at));
  const height = Math.max(...dashboard.panels.map(({ gridPos }) => gridPos.y + gridPos.h)) * (ROW + GAP);
  return (
    <>
      <header style={{ display: "flex", justifyContent: "space-between", padding: 2 * GAP }}>
        <Text element="h1" variant="h4">
          {dashboard.title}
        </Text>
        <Text color="secondary">{`${from} to ${to}`}</Text>
      </header>
      <PanelContextProvider value={{ eventsScope: "global", eventBus: new EventBusSrv() }}>
        <main style={{ position: "relative", height }}>
          {dashboard.panels.map((panel) => (
            <div key={panel.id} style={{ position: "absolute", ...box(panel.gridPos, width) }}>
              {panel.type === "row" ? (
                <Row title={panel.title} />
              ) : (
                <Panel {...{ panel, range, width }} frames={found.get(panel.id)} />
              )}
            </div>
          ))}
        </main>
      </PanelContextProvider>
    </>
  );
}

function Row({ title }) {
  return (
    <div style={{ display: "flex", alignItems: "center", gap: GAP, height: ROW }}>
      <Icon name="angle-down" />
      <Text element="h2" variant="h6">
        {title}
      </Text>
    </div>
  );
}

function Panel({ panel, frames, range, width }) {
  const { width: across, height } = box(panel.gridPos, width);
  return (
    <PanelChrome title={panel.title} description={panel.description} width={across} height={height}>
      {(innerWidth, innerHeight) => <Content {...{ panel, frames, range }} width={innerWidth} height={innerHeight} />}
    </PanelChrome>
  );
}

function Content({ panel, frames, range, width, height }) {
  if (!frames.length) {
    return (
      <div style={{ display: "grid", placeItems: "center", height }}>
        <Text color="secondary">No data</Text>
      </div>
    );
  }
  if (panel.type === "heatmap") {
    return <Heatmap {...{ frames, range, width, height }} />;
  }
  const { legend } = panel.options;
  return <TimeSeries {...{ frames, width, height, legend }} timeRange={range} timeZone="browser" />;
}
