"""JSON schemas of the parts of Kubernetes and KubeRay that `deploy/` uses, after their API references. Stricter than
those where that finds mistakes: what is not listed here is refused."""

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
BOOL: Schema = {"type": "boolean"}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}
LABEL: Schema = {"type": "string", "pattern": r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
PORT_NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?$"}


def fields(required: Schema | None = None, optional: Schema | None = None) -> Schema:
    """An object with these fields and no other."""
    required = required or {}
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


def items(schema: Schema) -> Schema:
    return {"type": "array", "items": schema, "minItems": 1}


def values(schema: Schema) -> Schema:
    return {"type": "object", "additionalProperties": schema}


LABELS = values(LABEL)
METADATA = fields({"name": NAME}, {"labels": LABELS})
SELECTOR = fields({"matchLabels": LABELS})
PROBE = fields(
    {"httpGet": fields({"path": {"type": "string", "pattern": "^/"}, "port": PORT_NAME}), "periodSeconds": COUNT},
    {"timeoutSeconds": COUNT, "failureThreshold": COUNT},
)
RESOURCES = fields({"requests": values(QUANTITY), "limits": values(QUANTITY)})
ENV_OF_SECRET = fields({"name": STRING, "valueFrom": fields({"secretKeyRef": fields({"name": NAME, "key": STRING})})})
CONTAINER = fields(
    {"name": NAME, "image": STRING, "resources": RESOURCES},
    {
        "command": items(STRING),
        "args": items(STRING),
        "env": items({"oneOf": [fields({"name": STRING, "value": STRING}), ENV_OF_SECRET]}),
        "ports": items(fields({"name": PORT_NAME, "containerPort": PORT})),
        "startupProbe": PROBE,
        "livenessProbe": PROBE,
        "readinessProbe": PROBE,
        "lifecycle": fields({"preStop": fields({"exec": fields({"command": items(STRING)})})}),
        "securityContext": fields({"allowPrivilegeEscalation": BOOL, "capabilities": fields({"drop": items(STRING)})}),
        "volumeMounts": items(
            fields({"name": NAME, "mountPath": {"type": "string", "pattern": "^/"}}, {"readOnly": BOOL})
        ),
    },
)
VOLUME: Schema = {
    "oneOf": [
        fields({"name": NAME, "persistentVolumeClaim": fields({"claimName": NAME}, {"readOnly": BOOL})}),
        fields({"name": NAME, "secret": fields({"secretName": NAME}, {"defaultMode": COUNT})}),
        fields({"name": NAME, "emptyDir": fields({}, {"medium": {"const": "Memory"}, "sizeLimit": QUANTITY})}),
    ]
}
POD = fields(
    {"containers": items(CONTAINER)},
    {
        "restartPolicy": {"enum": ["Always", "OnFailure", "Never"]},
        "terminationGracePeriodSeconds": COUNT,
        "securityContext": fields({}, {"runAsNonRoot": BOOL, "runAsUser": COUNT, "fsGroup": COUNT}),
        "tolerations": items(fields({"key": STRING, "operator": {"const": "Exists"}, "effect": STRING})),
        "volumes": items(VOLUME),
    },
)
TEMPLATE = fields({"metadata": fields({"labels": LABELS}), "spec": POD})
RAY_START_PARAMS = values({"type": "string"})  # numbers, too, must be strings
RAY_CLUSTER = fields(
    {
        "rayVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        "headGroupSpec": fields({"rayStartParams": RAY_START_PARAMS, "template": TEMPLATE}),
        "workerGroupSpecs": items(
            fields(
                {
                    "groupName": NAME,
                    "replicas": COUNT,
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "rayStartParams": RAY_START_PARAMS,
                    "template": TEMPLATE,
                }
            )
        ),
    },
    {
        "authOptions": fields({"mode": {"enum": ["token", "disabled"]}}),
        "enableInTreeAutoscaling": BOOL,
        "autoscalerOptions": fields({}, {"idleTimeoutSeconds": COUNT}),
    },
)
SERVICE_PORT = fields(
    {"name": PORT_NAME, "port": PORT, "targetPort": PORT_NAME}, {"appProtocol": STRING, "protocol": STRING}
)
PEER = fields(
    {},
    {"podSelector": SELECTOR, "namespaceSelector": {"type": "object", "maxProperties": 0}},
)
SPECS: dict[tuple[str, str], Schema] = {
    ("apps/v1", "Deployment"): fields(
        {"replicas": COUNT, "selector": SELECTOR, "template": TEMPLATE},
        {
            "strategy": fields(
                {"type": {"enum": ["RollingUpdate", "Recreate"]}},
                {"rollingUpdate": fields({"maxUnavailable": COUNT, "maxSurge": COUNT})},
            )
        },
    ),
    ("batch/v1", "Job"): fields({"template": TEMPLATE}, {"backoffLimit": COUNT}),
    ("v1", "PersistentVolumeClaim"): fields(
        {
            "accessModes": items({"enum": ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"]}),
            "resources": fields({"requests": values(QUANTITY)}),
        },
        {"storageClassName": NAME},
    ),
    ("v1", "Service"): fields({"selector": LABELS, "ports": items(SERVICE_PORT)}, {"type": STRING}),
    ("policy/v1", "PodDisruptionBudget"): fields({"selector": SELECTOR, "minAvailable": COUNT}),
    ("networking.k8s.io/v1", "NetworkPolicy"): fields(
        {
            "podSelector": SELECTOR,
            "policyTypes": items({"enum": ["Ingress", "Egress"]}),
            "ingress": items(
                fields({}, {"ports": items(fields({"protocol": STRING, "port": PORT})), "from": items(PEER)})
            ),
        }
    ),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): fields(
        {
            "selector": SELECTOR,
            "endpoints": items(
                fields(
                    {"port": PORT_NAME, "path": STRING},
                    {
                        "interval": {"type": "string", "pattern": r"^\d+s$"},
                        "scrapeTimeout": {"type": "string", "pattern": r"^\d+s$"},
                        "authorization": fields(
                            {"type": {"const": "Bearer"}, "credentials": fields({"name": NAME, "key": STRING})}
                        ),
                    },
                )
            ),
        }
    ),
    ("ray.io/v1", "RayCluster"): RAY_CLUSTER,
    ("ray.io/v1", "RayJob"): fields(
        {"entrypoint": STRING, "rayClusterSpec": RAY_CLUSTER},
        {"backoffLimit": COUNT, "shutdownAfterJobFinishes": BOOL, "submitterPodTemplate": TEMPLATE},
    ),
}


def schema_of(manifest: dict[str, Any]) -> Schema:
    """Of the whole manifest. Raises KeyError for a kind that is not here."""
    kind = (manifest["apiVersion"], manifest["kind"])
    return fields({"apiVersion": {}, "kind": {}, "metadata": METADATA, "spec": SPECS[kind]})
