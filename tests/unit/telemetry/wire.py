"""Metrics as they go out: what a reader holds, encoded for OTLP and read back from the bytes."""

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest


def points_of(reader):
    """Metric -> its points: `attributes`, and `value` or `count`, `sum`, `bounds`, `buckets`, `exemplars`."""
    told = reader.get_metrics_data()
    if told is None:
        return {}
    request = ExportMetricsServiceRequest.FromString(encode_metrics(told).SerializeToString())
    metrics = [metric for of in request.resource_metrics for scope in of.scope_metrics for metric in scope.metrics]
    return {metric.name: [_point(each) for each in _data(metric).data_points] for metric in metrics}


def _data(metric):
    return getattr(metric, metric.WhichOneof("data"))


def _point(point):
    attributes = {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in point.attributes}
    exemplars = [(each.trace_id.hex(), each.span_id.hex()) for each in point.exemplars]
    if hasattr(point, "explicit_bounds"):
        told = {"count": point.count, "sum": point.sum, "bounds": tuple(point.explicit_bounds)}
        return told | {"attributes": attributes, "buckets": list(point.bucket_counts), "exemplars": exemplars}
    value = getattr(point, point.WhichOneof("value"))
    return {"value": value, "attributes": attributes, "exemplars": exemplars}
